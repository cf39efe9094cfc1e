"""Generates jaxserve/v1 and what is beside it from proto/, or checks what is committed.

`python .ci/protos.py` writes; `python .ci/protos.py --check` writes elsewhere and compares, so that
it says the same with and without git. Directory, protobuf package and Python package share one
path, so nothing that is generated has to be patched. Other projects' protos keep their packages,
which are on the wire; for protoc they lie where their Python does.
"""

from __future__ import annotations

import filecmp
import importlib.resources
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
THIRD_PARTY = "jaxserve/third_party"
GENERATED = ("jaxserve/v1", "jaxserve/internal/v1", f"{THIRD_PARTY}/triton")
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(target: Path) -> None:
    """Writes messages, stubs and their types under `target`."""
    plugins = Path(sys.executable).parent
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    sources = sorted(str(path) for path in (PROTO / "jaxserve").rglob("*.proto"))
    vendored = sorted((PROTO / "third_party").rglob("*.proto"))
    sources += [f"{THIRD_PARTY}/{path.relative_to(PROTO / 'third_party')}" for path in vendored]
    arguments = [
        "protoc",
        f"-I{THIRD_PARTY}={PROTO / 'third_party'}",
        f"-I{PROTO}",
        f"-I{well_known}",
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out=quiet:{target}",
        f"--mypy_grpc_out=quiet:{target}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        sys.exit(f"protoc failed on {len(sources)} files under {PROTO.name}/; see above")


def generated_files(root: Path) -> set[str]:
    """Returns the names of the generated files in `root`."""
    return {path.name for pattern in PATTERNS for path in root.glob(pattern)}


def differences(fresh: Path, committed: Path) -> list[str]:
    """Returns the names of files that are stale, missing or left over in `committed`."""
    names = generated_files(fresh) | generated_files(committed)
    _, changed, absent = filecmp.cmpfiles(fresh, committed, names, shallow=False)
    return sorted(changed + absent)


def main() -> None:
    """Generates, or with --check compares and exits 1 on a difference."""
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        stale = [
            f"{folder}/{name}"
            for folder in GENERATED
            for name in differences(Path(scratch, folder), ROOT / folder)
        ]
    if stale:
        sys.exit(f"not what proto/ generates: {', '.join(stale)}; run `make proto` and commit them")
    count = sum(len(generated_files(ROOT / folder)) for folder in GENERATED)
    print(f"{', '.join(GENERATED)} are what proto/ generates ({count} files)")


if __name__ == "__main__":
    main()
