"""What is known of each device: one table, with its sources. Nothing here asks a device.

Peaks are those of the data sheets: dense, without sparsity, and one direction of a link (the sheets
add both). Memory is the sheet's GB as 10^9 bytes, a few per cent below what the driver reports;
its own context takes about the difference. What programs reach of the peaks stands apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxserve.errors import ConfigError

JAX_PREALLOCATES = 0.75
"""Of a GPU's memory is all that JAX takes unless XLA_CLIENT_MEM_FRACTION says otherwise (JAX
documentation, "GPU memory allocation"), so it is what ``launch`` finds free."""
SUSTAINED_MEMORY = 0.9
"""Of the peak. An H200 was measured to copy 4.3 TB/s of 4.8; taken for the other GPUs too."""
SUSTAINED_FLOPS = 0.8
"""Of the peak. An H200 was measured to reach 790 TFLOP/s of 989 in large bfloat16 products; taken
for the other GPUs too."""
SUSTAINED_LINK = 0.8
"""Of the peak, for large messages. An assumption: no mesh of GPUs was measured."""


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """One kind of device. Rates are peaks of one device, per second."""

    name: str
    platform: str
    """JAX's word: ``gpu`` or ``cpu``."""
    kind: str
    """How JAX's ``device_kind`` begins."""
    memory_bytes: int | None
    """None: the machine that plans is asked, as ``launch`` would."""
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    """By the dtype of a product's operands; sums are float32."""
    link_bytes_per_s: float
    """To the other devices of a host, one direction."""
    link_latency_s: float
    """Of one exchange of few bytes. An assumption, of the order that NCCL's small all-reduces take
    on eight devices; no data sheet says it."""
    network_bytes_per_s: float
    """To other hosts, the device's share, one direction."""
    devices_per_host: int
    usable_memory: float = JAX_PREALLOCATES
    sustained_memory: float = SUSTAINED_MEMORY
    sustained_flops: float = SUSTAINED_FLOPS
    sustained_link: float = SUSTAINED_LINK
    simulated: bool = False
    """All devices of a mesh are one machine, and share its memory and its speed."""
    source: str


def _gpu_flops(half: float, single: float) -> dict[str, float]:
    # XLA may use TF32 for float32 products, which is faster: these are the slower, plain ones.
    return {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}


DEVICES = (
    DeviceFacts(
        name="h200",
        platform="gpu",
        kind="NVIDIA H200",
        memory_bytes=141 * 10**9,
        memory_bytes_per_s=4.8e12,
        flops_per_s=_gpu_flops(989.0, 67.0),
        link_bytes_per_s=450e9,  # NVLink 4: 900 GB/s both ways.
        link_latency_s=15e-6,
        network_bytes_per_s=50e9,  # DGX H200 data sheet: a 400 Gb/s ConnectX-7 for each GPU.
        devices_per_host=8,
        source="NVIDIA H200 Tensor Core GPU data sheet, SXM",
    ),
    DeviceFacts(
        name="h100",
        platform="gpu",
        kind="NVIDIA H100 80GB",
        memory_bytes=80 * 10**9,
        memory_bytes_per_s=3.35e12,
        flops_per_s=_gpu_flops(989.0, 67.0),
        link_bytes_per_s=450e9,
        link_latency_s=15e-6,
        network_bytes_per_s=50e9,  # DGX H100 data sheet: as DGX H200.
        devices_per_host=8,
        source="NVIDIA H100 Tensor Core GPU data sheet, SXM",
    ),
    DeviceFacts(
        name="a100-80",
        platform="gpu",
        kind="NVIDIA A100-SXM4-80GB",
        memory_bytes=80 * 10**9,
        memory_bytes_per_s=2.039e12,
        flops_per_s=_gpu_flops(312.0, 19.5),
        link_bytes_per_s=300e9,  # NVLink 3: 600 GB/s both ways.
        link_latency_s=20e-6,
        network_bytes_per_s=25e9,  # DGX A100 80GB data sheet: a 200 Gb/s ConnectX for each GPU.
        devices_per_host=8,
        source="NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM",
    ),
    DeviceFacts(
        name="l40s",
        platform="gpu",
        kind="NVIDIA L40S",
        memory_bytes=48 * 10**9,
        memory_bytes_per_s=864e9,
        flops_per_s=_gpu_flops(362.0, 91.6),
        link_bytes_per_s=32e9,  # PCIe 4.0 x16: 64 GB/s both ways, no NVLink.
        link_latency_s=30e-6,
        network_bytes_per_s=12.5e9,  # An assumption: 100 Gb/s for each GPU.
        devices_per_host=8,
        source="NVIDIA L40S data sheet",
    ),
    DeviceFacts(
        name="rtx-4090",
        platform="gpu",
        kind="NVIDIA GeForce RTX 4090",
        memory_bytes=24 * 10**9,
        memory_bytes_per_s=1.008e12,
        flops_per_s=_gpu_flops(165.2, 82.6),  # Half precision with float32 sums.
        link_bytes_per_s=32e9,  # PCIe 4.0 x16, through the host's memory.
        link_latency_s=30e-6,
        network_bytes_per_s=1.25e9,  # An assumption: 10 Gb/s for each GPU.
        devices_per_host=8,
        source="NVIDIA Ada GPU architecture whitepaper, appendix A, GeForce RTX 4090",
    ),
    DeviceFacts(
        name="cpu",
        platform="cpu",
        kind="cpu",
        memory_bytes=None,
        memory_bytes_per_s=20e9,
        flops_per_s={"float32": 0.16e12, "bfloat16": 0.14e12, "float16": 0.14e12},
        link_bytes_per_s=10e9,
        link_latency_s=50e-6,
        network_bytes_per_s=1.25e9,
        devices_per_host=4096,
        usable_memory=1.0,
        sustained_memory=1.0,
        sustained_flops=1.0,
        sustained_link=1.0,
        simulated=True,
        source="modest: two shared cores without AMX, README.md (float16 and links assumed); "
        "the machine at hand is not measured",
    ),
)


def device_names() -> tuple[str, ...]:
    """Returns what ``device_facts`` knows."""
    return tuple(facts.name for facts in DEVICES)


def device_facts(name: str) -> DeviceFacts:
    """Looks a device up; ``cpu:N`` is ``cpu``, however many are simulated.

    Raises:
        ConfigError: there is no such device; the message lists the names.
    """
    kind, colon, count = name.lower().partition(":")
    is_count = count.isdecimal() and int(count) > 0
    for facts in DEVICES:
        if facts.name == kind and (not colon or (facts.simulated and is_count)):
            return facts
    raise ConfigError(
        f"device is {name!r}, of which nothing is known; choose {', '.join(device_names())}, or "
        "cpu:N (N simulated devices)"
    )


def facts_of_kind(device_kind: str) -> DeviceFacts | None:
    """Looks up what JAX calls ``device_kind``; None when nothing is known of it."""
    return next((facts for facts in DEVICES if device_kind.startswith(facts.kind)), None)
