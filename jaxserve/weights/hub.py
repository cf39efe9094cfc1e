"""From what the operator typed to a path on disk: an alias, a local path, or a hub id.

Downloads go through ``huggingface_hub`` into its own cache, and only files that cannot run code are
asked for. Opening the result is left to ``checkpoint.py``; ``dummy:`` models never come here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxserve.errors import CheckpointError

SMOLLM2_FILE = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3_FILE = "gemma3/gemma-3-270m.Q4_K_M.gguf"
ALIASES: Mapping[str, str] = {"smollm2": SMOLLM2_FILE, "gemma3": GEMMA3_FILE}
"""Short names, and the file in the assets directory that each stands for."""

ALLOWED_FILES = ("*.json", "*.safetensors", "*.jinja")
"""No pickles, no Python files, no duplicates in other formats."""
IGNORED_FILES = ("original/*", "onnx/*", "*/*")
"""Subdirectories hold copies in other formats; what is served lies at the top."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(
    model: str,
    *,
    assets_dir: Path,
    cache_dir: Path | None = None,
    offline: bool = False,
    files: Sequence[str] = ALLOWED_FILES,
) -> Path:
    """Returns the local path of a model, downloading it when it is a hub id.

    Args:
        model: an alias, a path, or ``owner/name`` on the hub.
        assets_dir: where ``make assets`` puts its files.
        cache_dir: the hub's cache; None is the library's default.
        offline: use only what is in the cache already.
        files: patterns of what is fetched of a hub id.

    Raises:
        CheckpointError: nothing is there, or it cannot be fetched.
    """
    if model in ALIASES:
        path = assets_dir / ALIASES[model]
        if not path.is_file():
            raise CheckpointError(
                f"model {model!r} needs {path}, which is missing; fetch it with "
                f"`python -m jaxserve.assets {model}`"
            )
        return path
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"model {model!r} is no file or directory here, no hub id (owner/name), no alias "
            f"({', '.join(ALIASES)}) and no dummy:NAME; check the spelling"
        )
    return _download(model, cache_dir, offline=offline, files=files)


def _download(model: str, cache_dir: Path | None, *, offline: bool, files: Sequence[str]) -> Path:
    # Imported here: the hub client takes a third of a second, and local models never need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                model,
                cache_dir=cache_dir,
                allow_patterns=list(files),
                ignore_patterns=list(IGNORED_FILES),
                local_files_only=offline,
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"model {model!r} is gated on the hub; accept its terms there and set a hub token"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"model {model!r} does not exist on the hub, or is private; check the spelling, or set "
            "a hub token"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = "the hub is switched off (offline)" if offline else "the hub cannot be reached"
        raise CheckpointError(
            f"model {model!r} is not in the local cache and {reason}; connect once to fetch it, or "
            "give a local path"
        ) from error
    # A broken connection raises whatever the hub client's HTTP library of the day raises.
    except Exception as error:
        raise CheckpointError(
            f"model {model!r} could not be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}); "
            "try again, or give a local path"
        ) from error
