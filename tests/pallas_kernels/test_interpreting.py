"""The interpreter of GPU kernels sees what it should: the tests of the kernels' tests."""

from __future__ import annotations

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.target import Target, target
from tests.pallas_kernels import ring_kernel
from tests.pallas_kernels.interpreting import (
    Fault,
    RaceError,
    assert_caught,
    interpret,
    interpreted,
    plant,
)

FAULTS = (
    Fault("tile not waited for", "plgpu.barrier_wait(here.at[slot])", "pass"),
    Fault("free slot not waited for", "plgpu.barrier_wait(free.at[slot])", "pass"),
    Fault("barrier left undrained", "mosaic.drain(free, count, STAGES)", "pass"),
    Fault("never arrives", "plgpu.barrier_arrive(free.at[slot])", "pass"),
    Fault(
        "result not committed",
        "            plgpu.commit_smem()\n            plgpu.copy_smem_to_gmem",
        "            plgpu.copy_smem_to_gmem",
    ),
    Fault("result not waited for", "plgpu.wait_smem_to_gmem(0)", "pass"),
    Fault("last block lost", "lax.fori_loop(0, count, add", "lax.fori_loop(0, count - 1, add"),
)


def check(module: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal((5 * 8, 64), np.float32)
    out = interpret(module.sum_of_blocks, x, patience_s=5)
    np.testing.assert_allclose(out, x.reshape(5, 8, 64).sum(0), rtol=1e-5)


def test_every_fault_planted_in_a_small_kernel_is_caught() -> None:
    assert_caught(ring_kernel, FAULTS, check)


def test_a_fault_that_changes_nothing_is_reported_as_missed() -> None:
    harmless = Fault("harmless", 'kernel_name="sum_of_blocks"', 'kernel_name="sum"')
    with pytest.raises(AssertionError, match="not caught: harmless"):
        assert_caught(ring_kernel, [harmless], check)


@pytest.mark.parametrize(("new", "error"), [("no_such_name", NameError), ("here(slot)", TypeError)])
def test_an_edit_that_is_wrong_itself_catches_nothing(new: str, error: type[Exception]) -> None:
    old = "plgpu.barrier_wait(here.at[slot])"
    with pytest.raises(error) as caught:
        assert_caught(ring_kernel, [Fault("misspelt", old, new)], check)
    assert "with the fault 'misspelt', whose edit may be at fault itself" in caught.value.__notes__


def test_a_fault_may_say_what_it_raises_before_it_runs() -> None:
    old = "plgpu.barrier_wait(here.at[slot])"
    assert_caught(ring_kernel, [Fault("declared", old, "no_such_name", NameError)], check)


def test_an_error_of_the_runtime_that_is_not_the_interpreters_is_no_catch() -> None:
    def broken(module: ModuleType) -> None:
        if module is not ring_kernel:
            raise jax.errors.JaxRuntimeError("INTERNAL: NameError: name 'x' is not defined")

    with pytest.raises(jax.errors.JaxRuntimeError, match="NameError"):
        assert_caught(ring_kernel, FAULTS[:1], broken)


def test_without_a_kernel_nothing_was_interpreted() -> None:
    with pytest.raises(RuntimeError, match="no GPU kernel ran"):
        interpret(jnp.sin, jnp.zeros(3))


def test_a_race_is_an_error_that_says_so() -> None:
    uncommitted = next(fault for fault in FAULTS if fault.name == "result not committed")
    with pytest.raises(RaceError, match="found a race"):
        check(plant(ring_kernel, uncommitted))


def test_a_fault_must_name_a_text_that_occurs_once() -> None:
    with pytest.raises(AssertionError, match="twice: the text occurs 2 times"):
        plant(ring_kernel, Fault("twice", "plgpu.commit_smem()", "pass"))


def test_kernels_decline_where_they_cannot_run() -> None:
    with pytest.raises(NotImplementedError, match="this program is for cpu"):
        ring_kernel.sum_of_blocks(jnp.zeros((8, 64)))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", platform="gpu", num_cores=108)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "capability 9.0 (H100, " in str(mosaic.why_not())
        assert str(mosaic.why_not()).endswith("this program is for NVIDIA A100")


@pytest.mark.parametrize(
    ("kind", "is_hopper"),
    [("NVIDIA H200", True), ("NVIDIA H100 80GB HBM3", True), ("NVIDIA GH200 480GB", True)]
    + [(kind, False) for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA H1000")],
)
def test_a_hopper_is_known_by_its_name(kind: str, is_hopper: bool) -> None:
    assert Target("gpu", kind, None).is_hopper is is_hopper


def test_the_target_is_the_device_of_the_mesh_in_context() -> None:
    assert target().platform == "cpu"
    with interpreted(blocks=3):
        assert target() == Target("gpu", "NVIDIA H200", 3)
        assert mosaic.cores() == 3
        assert mosaic.is_interpreted()
        assert mosaic.why_not() is None
    assert not mosaic.is_interpreted()
