"""Compiles for GPUs that are not there, so that XLA itself says what programs need.

It takes JAX's CUDA plugin, ``ptxas`` and ``libdevice``, which the extra ``aot-gpu`` installs, and a
description of the device; no driver and no other library of CUDA. What is compiled this way is not
tuned for the device: products go the way that XLA takes without measuring.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxserve.planning.devices import DeviceFacts
from sharding.mesh import AXES, MeshShape

MOST_DEVICES = 8
"""Of one host, which is what is described."""
EXTRA = "jaxserve[aot-gpu]"

HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {memory_bytes_per_s:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  name: "{kind}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{kind}"
"""
"""XLA's ``GpuTargetConfigProto`` of an H100 or H200: the limits of compute capability 9.0 (CUDA C++
programming guide, "Compute Capabilities") and the data sheets. Not read off a device yet."""
TARGETS = {"h100": HOPPER, "h200": HOPPER}


def why_not(facts: DeviceFacts, shape: MeshShape) -> str | None:
    """Says why nothing can be compiled for a mesh of a GPU; None when it can."""
    if facts.name not in TARGETS:
        return f"nothing can be compiled for {facts.name} yet, only for {', '.join(TARGETS)}"
    if shape.devices > MOST_DEVICES:
        return f"nothing can be compiled for more than {MOST_DEVICES} devices"
    needed = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13", "nvidia.cu13")
    if not all(_is_there(module) for module in needed):
        return f"{EXTRA} is not installed, which compiles for {facts.name}"
    return None


def absent_mesh(facts: DeviceFacts, shape: MeshShape) -> Mesh:
    """Returns a mesh of devices for which programs can be compiled and not run.

    Args:
        facts: of a device for which ``why_not`` says nothing.
        shape: of the mesh.
    """
    target = TARGETS[facts.name].format(**vars(facts))
    # Partitions, hosts, devices of a host.
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x1x{shape.devices}"
    )
    return Mesh(np.array(topology.devices).reshape(shape.data, shape.tensor), AXES)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
