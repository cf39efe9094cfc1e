"""Compiled programs in files: written when compiled, then loaded instead of traced and compiled.

    <directory>/executables/<digest of the key>/key.json        every part of the key, readable
                                               /decode-1x1.xla   one program each
                                               /decode-1x1.NOTE.json   what was found out of it

A key (``fingerprint.py``) names everything that a program depends on, so a file whose key is the
same holds what would be compiled. It has a digest of its content, and names its key; what is
damaged, or cannot be loaded here, is compiled again. Loading a program can run code, as calling it
does: a folder of programs is to be trusted like the package itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache
from jax.experimental import serialize_executable

from jaxserve.errors import ExecutablesError
from pallas_kernels import native

logger = logging.getLogger(__name__)

STORE_BYTES = 2**30
"""Of all programs in a store. The default model's take 6 MB for each set of flags."""
FORMAT = 1
KEY_FILE = "key.json"
SUFFIX = ".xla"
KERNELS = "kernels"
"""The kind of note that says what a program consists of."""

type Key = Mapping[str, str]
"""The parts of a key by name, as ``fingerprint.py`` makes them."""


def key_digest(key: Key) -> str:
    """Names a key."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Signature:
    """How a program is called: what a file does not say of it."""

    arguments: Any
    """A pytree of what it takes; leaves do not matter."""
    results: Any
    """A pytree of what it returns; leaves do not matter."""
    devices: Sequence[Any]
    """That it runs on, in the order of the mesh."""


class DamagedError(Exception):
    """A file does not hold the program that it should."""


class ExecutableFolder:
    """The compiled programs of one key."""

    def __init__(self, path: Path, key: Key, *, must_hold: bool = False) -> None:
        """Opens or begins a folder.

        Args:
            path: of the folder.
            key: of the programs in it.
            must_hold: every program has to be there; nothing is written.
        """
        self.path = path
        self._key = key
        self._digest = key_digest(key)
        self._must_hold = must_hold
        self._warned = set[str]()
        self._lock = threading.Lock()

    def load(self, name: str, signature: Signature) -> Any:
        """Loads a program; None when it has to be compiled.

        Raises:
            ExecutablesError: it has to be there and is not, or cannot be loaded.
        """
        try:
            header, content = _read(self.path / f"{name}{SUFFIX}")
            if (header["program"], header["key"]) != (name, self._digest):
                raise DamagedError(f"it is {header['program']} of {header['key'][:12]}")
            _register(header["targets"])
            return serialize_executable.deserialize_and_load(
                content,
                jax.tree.structure((signature.arguments, {})),
                jax.tree.structure(signature.results),
                execution_devices=tuple(signature.devices),
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            if not self._must_hold:
                return None
            reason = str(error.strerror)
        except Exception as error:  # Whatever a damaged or foreign file makes of JAX's loader.
            reason = str(error) or type(error).__name__
        if self._must_hold:
            raise ExecutablesError(
                f"{self.path / name}{SUFFIX} cannot be loaded: {reason}; write the directory again "
                "with `jaxserve compile`, or leave --executables out"
            )
        self._warn("cannot be loaded and is compiled again", name, reason)
        return None

    def save(self, name: str, compiled: Any, targets: Iterable[str]) -> None:
        """Writes a program that was compiled in this process; failing to is said and harmless.

        Args:
            name: of the program.
            compiled: what XLA made; never what it has loaded, which it cannot write.
            targets: native kernels that it calls, by the names that they are registered under.
        """
        try:
            content, _, _ = serialize_executable.serialize(compiled)
            header = {
                "format": FORMAT,
                "program": name,
                "key": self._digest,
                "targets": sorted(targets),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / KEY_FILE).exists():
                key = json.dumps({"format": FORMAT, "key": dict(self._key)}, indent=1)
                _write(self.path / KEY_FILE, key.encode())
            head = json.dumps(header, sort_keys=True).encode()
            _write(self.path / f"{name}{SUFFIX}", head + b"\n" + content)
        except Exception as error:  # A full disk, or a backend that cannot write programs.
            self._warn("cannot be written", name, error)

    def note(self, name: str, kind: str) -> Any:
        """Returns what was noted of a program: whatever JSON holds, None when there is nothing.

        Args:
            name: of the program.
            kind: of the note.
        """
        try:
            content = json.loads((self.path / f"{name}.{kind}.json").read_text())
            return content["note"] if content["key"] == self._digest else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # It is found out again.

    def write_note(self, name: str, kind: str, note: Any) -> None:
        """Keeps what tracing a program has shown, so that who loads it need not trace it."""
        if self._must_hold:
            return
        content = json.dumps({"key": self._digest, "note": note})
        with suppress(OSError):  # As with programs, failing to is harmless.
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / f"{name}.{kind}.json", content.encode())

    def copy_to(self, out: Path, names: Iterable[str]) -> int:
        """Copies programs and their key into a new directory; returns the bytes written.

        Raises:
            ExecutablesError: one is not there, or the directory cannot be made or written.
        """
        partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True)
            for name in names:
                shutil.copyfile(self.path / f"{name}{SUFFIX}", partial / f"{name}{SUFFIX}")
                note = f"{name}.{KERNELS}.json"
                with suppress(FileNotFoundError):  # Failing to write one was harmless.
                    shutil.copyfile(self.path / note, partial / note)
            shutil.copyfile(self.path / KEY_FILE, partial / KEY_FILE)
            check_new(out)
            partial.rename(out)
        except OSError as error:
            raise ExecutablesError(
                f"{out} cannot be written: {error}; give a directory that can be made, on a disk "
                "with room"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return sum(file.stat().st_size for file in out.iterdir())

    def _warn(self, what: str, name: str, reason: object) -> None:
        """Once: what ails one file ails most."""
        with self._lock:
            is_new = what not in self._warned
            self._warned.add(what)
        if is_new:
            logger.warning("%s%s %s: %s", self.path / name, SUFFIX, what, reason)


class ExecutableStore:
    """The folders of every key that was launched with a cache directory, within a bound."""

    def __init__(self, directory: Path, *, most_bytes: int = STORE_BYTES) -> None:
        """Keeps programs under ``directory``."""
        self._path = directory / "executables"
        self._most_bytes = most_bytes

    def folder(self, key: Key) -> ExecutableFolder:
        """The programs of a key, which counts as used now."""
        path = self._path / key_digest(key)[:32]
        with suppress(OSError):
            os.utime(path)
        return ExecutableFolder(path, key)

    def evict(self, keep: ExecutableFolder) -> None:
        """Removes the folders that were not used for longest until the rest is within the bound."""
        entries: list[tuple[float, int, Path]] = []
        for path in self._path.iterdir() if self._path.is_dir() else ():
            with suppress(OSError):  # Another process may be removing it.
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append((path.stat().st_mtime, size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._most_bytes:
                return
            if path != keep.path:
                shutil.rmtree(path, ignore_errors=True)
                total -= size


def open_written(path: Path) -> dict[str, str]:
    """Reads the key of a directory that ``jaxserve compile`` has written.

    Raises:
        ExecutablesError: it is none.
    """
    try:
        content = json.loads((path / KEY_FILE).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']} and this version reads {FORMAT}")
        return {str(name): str(value) for name, value in content["key"].items()}
    except OSError as error:
        reason = f"{KEY_FILE}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{KEY_FILE}: {error}"
    raise ExecutablesError(
        f"--executables {path} is no directory of programs ({reason}); write one with "
        "`jaxserve compile MODEL --out DIR`"
    )


def check_key(path: Path, written: Key, needed: Key) -> None:
    """Compares the key of a directory with what this launch needs.

    Raises:
        ExecutablesError: with every part that differs, both values and the remedy.
    """
    differing = [
        f"{name} is {written.get(name, 'not recorded')} there and "
        f"{needed.get(name, 'unknown')} here"
        for name in sorted(written.keys() | needed.keys())
        if written.get(name) != needed.get(name)
    ]
    if differing:
        raise ExecutablesError(
            f"--executables {path} was compiled for something else: {'; '.join(differing)}; "
            "compile again with `jaxserve compile` and the flags of this launch, or leave "
            "--executables out"
        )


def check_new(out: Path) -> None:
    """Refuses to write over anything.

    Raises:
        ExecutablesError: the path exists.
    """
    if out.exists():
        raise ExecutablesError(f"--out {out} exists; give a directory that does not, or remove it")


@contextmanager
def without_jax_cache() -> Generator[None]:
    """Within the block this thread takes no program from JAX's own compilation cache, nor adds any.

    XLA's CPU backend writes out a program that it has loaded without its machine code, so what is
    to be kept in a file has to be compiled here. JAX's setting is for the whole process, in which
    weights are being loaded by small programs that its cache should keep.
    """
    before, _this_thread.compiles_anew = _this_thread.compiles_anew, True
    try:
        yield
    finally:
        _this_thread.compiles_anew = before


class _ThisThread(threading.local):
    compiles_anew = False


_this_thread = _ThisThread()
_is_cache_used = compilation_cache.is_cache_used


def _is_cache_used_here(backend: Any) -> bool:
    return not _this_thread.compiles_anew and _is_cache_used(backend)


compilation_cache.is_cache_used = _is_cache_used_here


def native_targets(jaxpr: Any) -> set[str]:
    """The native kernels that a traced program calls, by the names they are registered under."""
    found: set[str] = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ffi_call":
            found.add(str(equation.params["target_name"]))
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                found |= native_targets(getattr(part, "jaxpr", part))
    return found


def _is_jaxpr(part: Any) -> bool:
    return hasattr(part, "eqns")


def _register(targets: Iterable[str]) -> None:
    """Makes native kernels known to XLA, which tracing does otherwise."""
    nothing = [jax.ShapeDtypeStruct((), "int32")]
    for target in targets:
        # The name without the library's digest; the key has the digest.
        call = partial(native.call, target.partition(".")[0], nothing)
        jax.eval_shape(lambda call=call: tuple(call()))


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the content of a file, which are what was written."""
    head, _, content = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(head)
        intact = header["format"] == FORMAT
        intact = intact and header["sha256"] == hashlib.sha256(content).hexdigest()
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError("its header is damaged") from error
    if not intact:
        raise DamagedError("its content is damaged, or of another version")
    return header, content


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, whoever else writes the same file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
