from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxserve.errors import CheckpointError
from jaxserve.weights.hub import SMOLLM2_FILE, resolve_model

RESPONSE: Any = SimpleNamespace(headers={}, request=None)
"""As much of a response as the errors look at."""


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Makes every download fail."""

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def test_the_alias_is_the_asset(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"model 'smollm2' needs .*, which is missing; fetch it"
    ):
        resolve_model("smollm2", assets_dir=tmp_path)
    path = tmp_path / SMOLLM2_FILE
    path.parent.mkdir()
    path.touch()
    assert resolve_model("smollm2", assets_dir=tmp_path) == path


def test_a_local_path_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), assets_dir=Path("none")) == tmp_path


@pytest.mark.parametrize("model", ["./none", "/none/at/all", "none", "a/b/c", "owner/na me"])
def test_what_is_neither_path_nor_hub_id_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no file or directory here, no hub id"):
        resolve_model(model, assets_dir=tmp_path)


def test_a_hub_id_asks_only_for_files_that_cannot_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_model("owner/name", assets_dir=tmp_path, cache_dir=tmp_path, offline=True)
    assert found == tmp_path
    assert asked["model"] == "owner/name"
    assert asked["local_files_only"] is True
    assert set(asked["allow_patterns"]) == {"*.json", "*.safetensors", "*.jinja"}
    resolve_model("owner/name", assets_dir=tmp_path, files=("config.json",))
    assert asked["allow_patterns"] == ["config.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.RepositoryNotFoundError("no", response=RESPONSE),
            r"model 'owner/name' does not exist on the hub, or is private",
        ),
        (
            errors.GatedRepoError("no", response=RESPONSE),
            r"model 'owner/name' is gated on the hub; accept its terms",
        ),
        (errors.LocalEntryNotFoundError("no"), r"not in the local cache and the hub cannot be rea"),
        (errors.OfflineModeIsEnabled("no"), r"not in the local cache and the hub cannot be reach"),
        (
            errors.HfHubHTTPError("no luck", response=RESPONSE),
            r"could not be fetched from the hub \(HfHubHTTPError: no luck",
        ),
        (OSError(28, "No space left"), r"could not be fetched from the hub \(OSError: .*No space"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failed_download_is_one_clear_sentence(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, error)
    with pytest.raises(CheckpointError, match=message):
        resolve_model("owner/name", assets_dir=tmp_path)


def test_offline_is_named_as_the_reason(tmp_path: Path) -> None:
    """The real library, told not to use the network."""
    with pytest.raises(
        CheckpointError, match=r"cache and the hub is switched off \(offline\); con"
    ):
        resolve_model("owner/name", assets_dir=tmp_path, cache_dir=tmp_path, offline=True)
