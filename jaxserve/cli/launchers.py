"""The hosts of a mesh, from flags or from what a cluster's launcher put into the environment."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.cli import flags
from jaxserve.config import GroupConfig
from jaxserve.errors import ConfigError

AUTO = "auto"
DEFAULT_PORT = 8476
"""Of the coordinator, where a launcher names a host and no port."""
_LWS = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")
_FLAGS = ("host_id", "coordinator", "join_timeout_s", "host_timeout_s")

_PLACE_FLAGS = {"host_id": "--host-id", "coordinator": "--coordinator"}
"""What says where this host is; of no use without --hosts."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``GroupConfig``."""
    group = flags.add_fields(parser, "several hosts", GroupConfig, _FLAGS)
    group.add_argument(
        "--hosts",
        type=_count_or_auto,
        metavar="N|auto",
        help="hosts that share the mesh, each running this command; auto asks Slurm, Open MPI, "
        "LeaderWorkerSet or JobSet for this and for --host-id and --coordinator (default: 1)",
    )
    # Not given, rather than the config's: beside --hosts auto even --host-id 0 says something.
    parser.set_defaults(host_id=None, coordinator=None)
    group.add_argument(
        "--group-secret-file",
        type=Path,
        metavar="PATH",
        help="a file with a secret that every host of the group has; JAXSERVE_GROUP_SECRET holds "
        "it otherwise",
    )


def read_group(
    options: argparse.Namespace, environ: Mapping[str, str], *, insecure: bool
) -> GroupConfig:
    """Returns the hosts that share the mesh, and this one's place.

    Raises:
        ConfigError: a flag or a variable has to change.
    """
    given = flags.field_values(options, GroupConfig)
    values = {name: value for name, value in given.items() if value is not None}
    places = ", ".join(flag for name, flag in _PLACE_FLAGS.items() if name in values)
    if places and options.hosts is None:
        raise ConfigError(f"{places}: one host alone needs none; leave it out, or give --hosts too")
    if options.hosts == AUTO:
        if places:
            raise ConfigError(
                f"{places}: --hosts auto asks the launcher for that; leave it out, or give a "
                "number of --hosts"
            )
        values |= detect(environ)
    config = GroupConfig(**values, secret=_secret(options.group_secret_file, environ))
    if config.hosts > 1 and not config.secret and not insecure and not config.is_local:
        raise ConfigError(
            f"--coordinator {config.coordinator} is reached by other machines, and whoever can "
            "reach it could pose as a host; give every host the same --group-secret-file or "
            "JAXSERVE_GROUP_SECRET, or add --insecure if the network is trusted"
        )
    return config


def detect(environ: Mapping[str, str]) -> dict[str, Any]:
    """Asks the launcher that started this process.

    Raises:
        ConfigError: no launcher is known by its variables, or they do not make sense.
    """
    if all(name in environ for name in _LWS):
        address, size, index = (environ[name] for name in _LWS)
        found: tuple[str, str | int, str | int] = (f"{address}:{DEFAULT_PORT}", size, index)
    else:
        found = _ask_jax()
    try:
        return {"coordinator": found[0], "hosts": int(found[1]), "host_id": int(found[2])}
    except ValueError as error:
        raise ConfigError(
            f"--hosts auto: the launcher's variables are no numbers: {error}"
        ) from None


def _ask_jax() -> tuple[str, int, int]:
    # JAX reads the process's own environment; it knows these launchers and we need not.
    from jax._src import clusters

    for kind in (clusters.OmpiCluster, clusters.SlurmCluster, clusters.K8sCluster):
        if kind.is_env_present():
            try:
                address = kind.get_coordinator_address(60, None)
                return address, kind.get_process_count(), kind.get_process_id()
            except (RuntimeError, ValueError, KeyError) as error:
                raise ConfigError(f"--hosts auto: {kind.__name__}: {error}") from error
    raise ConfigError(
        "--hosts auto: no launcher is recognised (Slurm, Open MPI, LeaderWorkerSet, JobSet); give "
        "--hosts N --host-id I --coordinator HOST:PORT"
    )


def _secret(path: Path | None, environ: Mapping[str, str]) -> bytes:
    if path is None:
        return environ.get("JAXSERVE_GROUP_SECRET", "").encode()
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--group-secret-file {path} cannot be read: {error}") from error
    if not secret:
        raise ConfigError(f"--group-secret-file {path} is empty; put a long random text into it")
    return secret


def _count_or_auto(text: str) -> int | str:
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number of hosts or auto, not {text!r}") from None
