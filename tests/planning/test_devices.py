from __future__ import annotations

import pytest

from jaxserve.errors import ConfigError
from jaxserve.planning.devices import DEVICES, device_facts, device_names, facts_of_kind
from jaxserve.planning.traffic import Traffic, typical


def test_the_table_has_the_devices_that_are_promised_each_with_a_source() -> None:
    assert device_names() == ("h200", "h100", "a100-80", "l40s", "rtx-4090", "cpu")
    for facts in DEVICES:
        assert facts.source
        assert facts.flops_per_s.keys() == {"float32", "bfloat16", "float16"}


def test_what_an_h200_sustains_is_what_was_measured() -> None:
    """4.3 TB/s copied and 790 TFLOP/s multiplied, to within a hundredth."""
    facts = device_facts("H200")
    assert facts.memory_bytes_per_s * facts.sustained_memory == pytest.approx(4.3e12, rel=0.01)
    assert facts.flops_per_s["bfloat16"] * facts.sustained_flops == pytest.approx(790e12, rel=0.01)


def test_simulated_devices_are_cpus() -> None:
    assert device_facts("cpu:8") is device_facts("cpu")


@pytest.mark.parametrize("name", ["b300", "h200:8", "cpu:", "cpu:0", "cpu:many", "cuda"])
def test_an_unknown_device_is_refused_with_the_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"of which nothing is known; choose h200, h100, .*cpu:N"):
        device_facts(name)


def test_a_typical_sequence_is_shortened_to_the_context_unless_it_was_asked_for() -> None:
    assert typical(None, None, 8192) == Traffic(prompt_tokens=1000, output_tokens=256)
    assert typical(None, None, 512) == Traffic(prompt_tokens=256, output_tokens=256)
    assert typical(500, None, 512) == Traffic(prompt_tokens=500, output_tokens=12)
    assert typical(500, None, 512).tokens == 512


@pytest.mark.parametrize(("prompt", "output"), [(512, None), (0, None), (500, 13), (5, 0)])
def test_a_sequence_that_the_context_does_not_hold_is_refused(
    prompt: int, output: int | None
) -> None:
    with pytest.raises(ConfigError, match=r"no sequence within 512 tokens of context; change --pr"):
        typical(prompt, output, 512)


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("cpu", "cpu"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40", None),
    ],
)
def test_a_device_at_hand_is_looked_up_by_what_jax_calls_it(
    device_kind: str, name: str | None
) -> None:
    facts = facts_of_kind(device_kind)
    assert (facts and facts.name) == name
