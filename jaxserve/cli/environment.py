"""Every environment variable that jaxserve reads, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxserve.assets import default_directory
from jaxserve.frontend.grpc.config import ServerConfig

HELP = """\
environment variables (flags win over them):
  JAXSERVE_SERVER   address for --server
  JAXSERVE_ASSETS   folder of the pinned weights, for --assets-dir
  JAXSERVE_CACHE    folder of compiled programs, for --cache-dir
  JAXSERVE_GROUP_SECRET  known to every host of a mesh, instead of --group-secret-file
  XDG_CACHE_HOME    where both are kept otherwise; ~/.cache when it is not set
  HF_HUB_OFFLINE    1 never asks a model hub, as --offline does
  NO_COLOR          plain progress bars
JAX reads its own, such as JAX_PLATFORMS and XLA_FLAGS."""

TRUE = frozenset({"1", "true", "yes", "on"})


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the environment says."""

    assets_dir: Path
    cache_dir: Path
    server: str | None
    """Where a server is, when one was named."""
    offline: bool
    variables: Mapping[str, str]
    """All of them, for what a cluster's launcher has to say."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Environment:
        """Reads a mapping such as ``os.environ``; an empty value counts as none."""
        base = environ.get("XDG_CACHE_HOME")
        home = (Path(base) if base else Path.home() / ".cache") / "jaxserve"
        cache = environ.get("JAXSERVE_CACHE")
        return cls(
            assets_dir=default_directory(environ),
            cache_dir=Path(cache) if cache else home,
            server=environ.get("JAXSERVE_SERVER") or None,
            offline=environ.get("HF_HUB_OFFLINE", "").lower() in TRUE,
            variables=environ,
        )

    @property
    def default_server(self) -> str:
        """Where a server is looked for when none was named."""
        return self.server or ServerConfig().address
