"""Plans for GPUs that are compiled without one."""

from __future__ import annotations

import pytest

from jaxserve.models.presets import preset
from jaxserve.planning import aot
from jaxserve.planning.devices import device_facts
from jaxserve.planning.memory import estimate_temporaries, plan_device
from sharding.mesh import parse_mesh
from tests.planning.planned import sizes_of


@pytest.mark.parametrize(
    ("device", "mesh", "reason"),
    [
        ("a100-80", "1x1", "nothing can be compiled for a100-80 yet, only for h100, h200"),
        ("h200", "2x8", "nothing can be compiled for more than 8 devices"),
        ("h100", "1x8", "jaxserve[aot-gpu] is not installed, which compiles for h100"),
    ],
)
def test_a_plan_says_why_it_does_not_compile(
    device: str, mesh: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "_is_there", lambda module: module != "nvidia.cu13")
    assert aot.why_not(device_facts(device), parse_mesh(mesh)) == reason


def test_a_module_whose_package_is_missing_is_not_there() -> None:
    assert aot._is_there("json.decoder")
    assert not aot._is_there("json.nothing")
    assert not aot._is_there("nothing.at.all")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1", "2x2"])
def test_temporaries_of_an_h200_are_compiled_and_within_the_bound(mesh: str) -> None:
    facts, shape = device_facts("h200"), parse_mesh(mesh)
    reason = aot.why_not(facts, shape)
    if reason is not None:
        pytest.skip(f"{reason}; `make prove-aot` installs it")
    sizes = sizes_of("smollm2-135m", facts, mesh)
    model = preset("smollm2-135m")
    memory = plan_device(model, shape, facts, sizes, compile_on=aot.absent_mesh(facts, shape))
    bound = plan_device(model, shape, facts, sizes)
    assert (memory.temp_source, bound.temp_source) == ("compiled", "estimated")
    assert 10**6 < memory.budget.temporary_bytes < bound.budget.temporary_bytes
    assert memory.pages >= bound.pages
    assert bound.budget.temporary_bytes == estimate_temporaries(bound.runner, facts)
