"""Who takes part: each system's precision, door, environment, driver and settings.

Everybody gets the same 2 threads, 64 rows, prompts in chunks of 512 tokens, 2 GiB of cache where
it can be said, and a prefix cache where there is one. llama.cpp has 32 rows, each with room for the
longest prompt, and so waits with half of the 64 requests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.workloads import NUMBERED

ROWS = 64
STEP_TOKENS = 512
CONTEXT_TOKENS = 8192
KV_GB = 2
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
LLAMA_ROWS = 32
LLAMA_ROW_TOKENS = 4352

CLASSES = ("bf16", "8 bit", "4 bit")
WORKLOADS = tuple(NUMBERED)
"""In the order in which they are run."""


@dataclass(frozen=True)
class Places:
    """Where things are."""

    root: Path
    """Of the installed peers."""
    gguf: Path
    """The model as ``jaxserve`` serves it."""

    def python(self, peer: str) -> Path:
        """Returns the interpreter of a peer's environment."""
        return self.root / peer / "venv" / "bin" / "python"

    @property
    def hf(self) -> Path:
        """The model for vLLM and transformers: the GGUF file's weights in bfloat16."""
        return self.root / "models" / "hf"

    def openvino(self, weights: str) -> Path:
        """The model for OpenVINO, with weights of ``fp16`` or ``int8``."""
        return self.root / "models" / f"openvino-{weights}"

    @property
    def prompts(self) -> Path:
        """Token ids of a few beginnings of texts."""
        return self.root / "models" / "prompts.json"

    @property
    def llama_server(self) -> Path:
        """The server of llama.cpp."""
        return self.root / "llama-cpp" / "build" / "bin" / "llama-server"


@dataclass(frozen=True, kw_only=True)
class System:
    """One engine at one precision behind one door."""

    name: str
    precision: str
    """As its own documentation would say it."""
    precision_class: str
    """Of ``CLASSES``: systems of one class are compared."""
    door: str
    peer: str | None
    """Whose environment the child runs in; None is this project's own."""
    driver: str
    """Module of ``drivers``."""
    options: Callable[[Places], dict[str, Any]]
    needs: Callable[[Places], tuple[Path, ...]] = lambda places: ()
    """Files without which it cannot start."""
    environment: Callable[[Places], dict[str, str]] = field(default=lambda places: {})
    workloads: tuple[str, ...] = WORKLOADS

    @property
    def is_ours(self) -> bool:
        """Whether it is jaxserve, which is compared with the others."""
        return self.driver == "jaxserve"

    def missing(self, places: Places) -> Path | None:
        """Returns a file that it lacks."""
        needed = (*((places.python(self.peer),) if self.peer else ()), *self.needs(places))
        return next((path for path in needed if not path.exists()), None)

    def command(self, places: Places) -> list[str]:
        """Returns the command of its child, but for the options."""
        python = places.python(self.peer) if self.peer else Path(sys.executable)
        return [str(python), "-m", "bench.peers.child", self.driver]


def _vllm_environment(places: Places) -> dict[str, str]:
    # Both are what its own documentation tells to preload on a CPU.
    wanted = (places.root / "vllm" / "tcmalloc", places.root / "vllm" / "venv" / "lib")
    names = ("libtcmalloc_minimal.so.4", "libiomp5.so")
    found = [
        str(path)
        for folder, name in zip(wanted, names, strict=True)
        for path in sorted(folder.rglob(name))[:1]
    ]
    return {
        "LD_PRELOAD": ":".join(found),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GB),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
        "OMP_NUM_THREADS": str(THREADS),  # Otherwise it asks PyTorch for one thread.
        "VLLM_CACHE_ROOT": str(places.root / "vllm" / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        **_OFFLINE,
    }


def _vllm_server(places: Places) -> dict[str, Any]:
    words = [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(places.hf)),
        *("--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16"),
        *("--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", str(ROWS)),
        *("--disable-log-stats", "--disable-uvicorn-access-log"),
    ]
    return {
        "command": [str(places.python("vllm")), *words],
        "dialect": "openai",
        "model": str(places.hf),
        "version": VERSIONS["vllm"],
    }


def _llama_server(places: Places) -> dict[str, Any]:
    words = [
        *("-m", str(places.gguf), "--host", "127.0.0.1", "--port", "{port}"),
        *("-c", str(LLAMA_ROWS * LLAMA_ROW_TOKENS), "-np", str(LLAMA_ROWS), "-no-kvu"),
        *("-t", str(THREADS), "-tb", str(THREADS), "--no-webui"),
    ]
    return {
        "command": [str(places.llama_server), *words],
        "dialect": "llama.cpp",
        "model": "",
        "version": f"llama-cpp-python {VERSIONS['llama-cpp']}",
    }


def _in_bf16(
    name: str,
    peer: str,
    door: str,
    options: Callable[[Places], dict[str, Any]],
    environment: Callable[[Places], dict[str, str]],
    **other: Any,
) -> System:
    """One that reads the model in bfloat16."""
    return System(
        name=name,
        precision="bf16",
        precision_class="bf16",
        door=door,
        peer=peer,
        driver="http" if door == "HTTP" else peer,
        options=options,
        needs=lambda places: (places.hf,),
        environment=environment,
        **other,
    )


def _openvino(weights: str, precision_class: str) -> System:
    return System(
        name=f"openvino-{weights}",
        precision=f"{weights} weights",
        precision_class=precision_class,
        door="in process",
        peer="openvino",
        driver="openvino",
        options=lambda places: {
            "model": str(places.openvino(weights)),
            "max_rows": ROWS,
            "step_tokens": STEP_TOKENS,
            "kv_gb": KV_GB,
        },
        needs=lambda places: (places.openvino(weights),),
    )


def _jaxserve(name: str, precision: str, precision_class: str, *flags: str) -> System:
    return System(
        name=name,
        precision=precision,
        precision_class=precision_class,
        door="gRPC",
        peer=None,
        driver="jaxserve",
        options=lambda places: {"flags": ["smollm2", "--offline", *flags]},
        needs=lambda places: (places.gguf,),
    )


_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

VERSIONS: Mapping[str, str] = {
    "vllm": "0.32.0",
    "llama-cpp": "0.3.36",
    "openvino": "2026.4.1.0",
    "transformers": "5.23.0",
}
"""By environment; what ``install.py`` pins."""

SYSTEMS = (
    _jaxserve("jaxserve-bf16", "bf16", "bf16", "--dtype", "bfloat16", "--quantization", "none"),
    _in_bf16(
        "vllm-cpu",
        "vllm",
        "in process",
        lambda places: {
            "model": str(places.hf),
            "dtype": "bfloat16",
            "max_rows": ROWS,
            "context_tokens": CONTEXT_TOKENS,
        },
        lambda places: {**_vllm_environment(places), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    ),
    _jaxserve("jaxserve-q4", "GGUF Q4_1", "4 bit", "--quantization", "auto"),
    System(
        name="llama.cpp",
        precision="GGUF Q4_1",
        precision_class="4 bit",
        door="HTTP",
        peer="llama-cpp",
        driver="http",
        options=_llama_server,
        needs=lambda places: (places.gguf, places.llama_server),
    ),
    _openvino("fp16", "bf16"),
    _jaxserve("jaxserve-int8", "int8 weights", "8 bit", "--quantization", "int8"),
    _openvino("int8", "8 bit"),
    _in_bf16("vllm-cpu-http", "vllm", "HTTP", _vllm_server, _vllm_environment, workloads=("W3",)),
    _in_bf16(
        "transformers",
        "transformers",
        "in process",
        lambda places: {
            "model": str(places.hf),
            "dtype": "bfloat16",
            "threads": THREADS,
            "step_tokens": STEP_TOKENS,
            "blocks": 160,
        },
        lambda places: dict(_OFFLINE),
    ),
)
"""In the order of the first round; each later round begins one further on."""
