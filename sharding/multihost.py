"""Joins this process to the device runtime of a mesh that spans hosts. Before JAX is used.

Everything experimental that this takes of JAX stands here.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from jax._src import distributed
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

RUNTIME_HEARTBEAT_S = 15
"""JAX's own watch over its processes, which aborts them without a word: a net below ours, which
notices earlier and names the host. The default of 100 s leaves a dead group standing."""


def join_runtime(
    *, runtime_address: str, hosts: int, host_id: int, own_address: str, timeout_s: float
) -> None:
    """Starts ``jax.distributed``; afterwards ``jax.devices()`` holds those of every host.

    Args:
        runtime_address: where host 0 waits for the others; the same everywhere.
        hosts: processes, one for each host.
        host_id: this one's number.
        own_address: where the others reach this host. CPU devices exchange data there; by default
            they would use whatever the host's name resolves to.
        timeout_s: for all hosts to come.
    """
    # The factory takes the address, and there is no setting that reaches it.
    gloo: Any = _jax.make_gloo_tcp_collectives
    _jax.make_gloo_tcp_collectives = partial(gloo, hostname=own_address)
    # It would take SIGTERM over, and wait for a training loop to save itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        runtime_address,
        hosts,
        host_id,
        initialization_timeout=max(1, round(timeout_s)),
        heartbeat_timeout_seconds=RUNTIME_HEARTBEAT_S,
        cluster_detection_method="deactivate",
        coordinator_bind_address=runtime_address if host_id == 0 else None,
    )


@contextmanager
def every_host_caches() -> Generator[None]:
    """Within the block this host writes the programs it compiles into its compilation cache.

    JAX lets process 0 alone write, for the sake of shared file systems. Our caches are local, or
    their entries differ by host, and a host that compiles again makes the others wait.
    """
    state = distributed.global_state
    process_id, state.process_id = state.process_id, 0
    try:
        yield
    finally:
        state.process_id = process_id
