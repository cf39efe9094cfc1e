"""Plans of published models against numbers worked out by hand, and of tiny ones against a launch.

The published parameter counts and cache sizes are in no way taken from the code.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.planning.devices import device_facts
from jaxserve.planning.memory import layout_notes
from jaxserve.planning.speed import Roofline
from sharding.mesh import parse_mesh
from tests.planning.planned import memory_of, planned, planned_on

pytestmark = pytest.mark.slow

PUBLISHED = {
    # model: parameters, those of the norms, bytes of keys and values of a token in bfloat16
    "llama-3.1-8b": (8_030_261_248, 65 * 4096, 131_072),
    "llama-3.3-70b": (70_553_706_496, 161 * 8192, 327_680),
    "qwen3-32b": (32_762_123_264, 129 * 5120 + 64 * 2 * 128, 262_144),
    # Routers are whole on every device, too.
    "mixtral-8x7b": (46_702_792_704, 65 * 4096 + 32 * 8 * 4096, 131_072),
}


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("tensor", [1, 8])
def test_published_models_have_their_published_sizes(model: str, tensor: int) -> None:
    """Everything is split evenly but the norms, which every device has."""
    params, norms, kv_bytes = PUBLISHED[model]
    memory = memory_of(model, f"1x{tensor}", dtype="bfloat16")
    assert memory.budget.weight_bytes == 2 * ((params - norms) // tensor + norms)
    assert memory.budget.page_bytes == 64 * kv_bytes // tensor
    if tensor == 1:
        plan = planned(model, "h200")
        assert (plan.params, plan.kv_bytes_per_token) == (params, kv_bytes)


@pytest.mark.parametrize("tensor", [1, 2])
def test_int8_pages_take_a_byte_for_each_number_and_two_for_each_scale(tensor: int) -> None:
    """Llama 3.1 8B: 32 layers, keys and values of 8 heads, 128 numbers and a scale each."""
    token = 32 * 2 * 8 * (128 + 2)
    memory = memory_of("llama-3.1-8b", f"1x{tensor}", dtype="bfloat16", kv_dtype="int8")
    assert memory.budget.page_bytes == 64 * token // tensor
    if tensor == 1:
        plan = planned("llama-3.1-8b", "h200", kv_dtype="int8")
        floats = planned("llama-3.1-8b", "h200", kv_dtype="bfloat16")
        assert plan.kv_bytes_per_token == token
        assert plan.hbm_bytes_per_step is not None
        assert floats.hbm_bytes_per_step is not None
        saved = floats.hbm_bytes_per_step - plan.hbm_bytes_per_step
        assert saved == 64 * (1256 + 1) * (131_072 - token)
        assert plan.flops_per_step == floats.flops_per_step


def test_the_plan_says_what_each_precision_would_hold() -> None:
    """On two data shards; what is planned is what a plan of another precision predicts of it."""
    plans = {
        name: planned("llama-3.1-8b", "h200", "2x1", kv_dtype=name)
        for name in ("bf16", "int8", "fp8", "int4", "fp32")
    }
    tokens = plans["bf16"].kv_tokens
    assert list(tokens) == ["bfloat16", "int8", "fp8", "int4"]
    assert list(plans["fp32"].kv_tokens) == ["float32", "bfloat16", "int8", "fp8", "int4"]
    for name, plan in plans.items():
        assert plan.kv_tokens.items() >= tokens.items(), name
        of_pages = 2 * (plan.pages_per_data_shard - 1) * plan.page_tokens
        assert plan.kv_tokens[plan.details.sizes.kv_name] == of_pages
    # A token takes 131,072 bytes, 66,560 and 33,792; counts are rounded down to four bits.
    assert tokens["int8"] == tokens["fp8"]
    assert 1.7 < tokens["int8"] / tokens["bfloat16"] < 2.2
    assert 3.4 < tokens["int4"] / tokens["bfloat16"] < 4.4


@pytest.mark.parametrize("pages", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("device", ["cpu", "h200"])
def test_pages_of_few_bits_are_planned_for_every_device(device: str, pages: str) -> None:
    floats, few = (planned("tiny-llama", device, kv_dtype=kv) for kv in ("float32", pages))
    assert few.flops_per_step == floats.flops_per_step
    assert few.kv_bytes_per_token < floats.kv_bytes_per_token / 2


def test_what_does_not_fit_holds_no_token() -> None:
    plan = planned("llama-3.3-70b", "h200", kv_dtype="bf16")
    assert not plan.fits
    assert set(plan.kv_tokens.values()) == {0}


@pytest.mark.parametrize(("mesh", "expected"), [("1x1", 427_264), ("1x2", 214_272)])
def test_the_weights_of_a_tiny_model_can_be_added_up_by_hand(mesh: str, expected: int) -> None:
    """Embedding 512 x 64; per layer 64 x 128, 64 x 64, 256 x 64, 64 x 128 and two norms of 64; a
    last norm: 106,816 float32, of which 320 are norms."""
    assert memory_of("tiny-llama", mesh).budget.weight_bytes == expected


def test_70b_in_bfloat16_needs_two_h200() -> None:
    """JAX takes 0.75 of 141 GB: 105.75. The weights are 141.1 GB; on two devices 70.6, and of the
    rest, some 34 GB, nine tenths hold the 131,072 x 163,840 = 21.5 GB of one sequence, not two."""
    one, two = planned("llama-3.3-70b", "h200"), planned("llama-3.3-70b", "h200", "1x2")
    assert (one.fits, one.nearest_fit) == (False, "1x2")
    assert one.details.memory.refusal is not None
    assert "100,851 MiB free - 134,571 MiB weights" in one.details.memory.refusal
    assert (one.pages_per_data_shard, one.sequences_guaranteed, one.step_ms) == (0, 0, None)
    assert (two.fits, two.nearest_fit, two.sequences_guaranteed) == (True, "1x2", 1)


def test_quantized_weights_can_be_added_up_by_hand() -> None:
    """8.03 billion weights: 2 x 128,256 x 4,096 of the ends are 8 bits and a sixteenth, the layers'
    4 bits and an eighth (scale and minimum), 65 norms of 4,096 are bfloat16."""
    params, ends, norms = 8_030_261_248, 2 * 128_256 * 4096, 65 * 4096
    layers = params - ends - norms
    expected = {
        "none": 2 * params,
        "auto": 2 * params,
        "int8": (ends + layers) * 34 // 32 + 2 * norms,
        "int4": ends * 34 // 32 + layers * 20 // 32 + 2 * norms,
    }
    for quantization, size in expected.items():
        plan = planned("llama-3.1-8b", "h200", quantization=quantization)
        assert plan.weight_bytes_per_device == size
        assert plan.quantization == {"auto": "none", "int4": "int4+int8"}.get(
            quantization, quantization
        )
    plain, small = (planned("llama-3.1-8b", "h200", quantization=q) for q in ("none", "int8"))
    assert plain.hbm_bytes_per_step is not None
    assert small.hbm_bytes_per_step is not None
    # Of an embedding that is not the head a few rows are read, which do not count.
    saved = (ends // 2 + layers) * 30 // 32
    assert plain.hbm_bytes_per_step - small.hbm_bytes_per_step == saved


def test_70b_in_4_bits_needs_one_h200() -> None:
    """45 GB of weights instead of 141."""
    plan = planned("llama-3.3-70b", "h200", quantization="int4", context_tokens=8192)
    assert (plan.fits, plan.nearest_fit) == (True, "1x1")


def test_8b_at_full_context_needs_three_rtx_4090() -> None:
    """18 GB are usable. One: 16.06 GB of weights and 17.2 of pages. Two: 8.03, and 8.59 of pages,
    for which nine tenths of at most 9.9 GB less temporaries (more than 0.4) are not enough. Three
    hold nine groups of heads for eight: 5.5 GB and 6.4."""
    assert planned("llama-3.1-8b", "rtx-4090").nearest_fit == "1x3"
    short = planned("llama-3.1-8b", "rtx-4090", "1x2", context_tokens=8192)
    assert short.fits
    assert planned("llama-3.1-8b", "rtx-4090", "1x2").fits is False


def test_some_models_fit_on_no_mesh() -> None:
    """An even share on 64 devices is 2.2 GB."""
    small = replace(device_facts("rtx-4090"), memory_bytes=2 * 10**9)
    plan = planned_on("llama-3.3-70b", small, "1x8")
    assert (plan.fits, plan.nearest_fit) == (False, None)


def test_sequences_are_counted_in_whole_pages_on_every_data_shard() -> None:
    """66 pages of 16 tokens: 64 keep their leading bits, one is the null page. A full context takes
    16 pages, 50 tokens take 4."""
    page = 16 * 2 * 2 * 2 * 16 * 4
    settings = {"page_tokens": 16, "context_tokens": 256, "kv_memory_bytes": 66 * page}
    memory = memory_of("tiny-llama", "2x1", **settings)
    assert memory.pages == 64
    assert (memory.rows(256), memory.rows(50), memory.rows(1)) == (3, 15, 63)
    assert memory_of("tiny-llama", "2x1", max_rows=2, **settings).rows(50) == 2, "at most the rows"


def test_notes_name_every_padded_copied_and_replicated_axis_with_its_cost() -> None:
    """SmolLM2 on 2: a fourth group of 3 heads of 64 costs 5 x 64 x 576 in w_qkv and 3 x 64 x 576 in
    w_o, over 30 layers, in 2 bytes: 17.7 MB. There are 61 norms of 576."""

    def notes(mesh: str) -> list[str]:
        runner = memory_of("smollm2-135m", mesh, dtype="bfloat16").runner
        return layout_notes(runner, parse_mesh(mesh))

    assert notes("2x2") == [
        "q_heads: 9 padded to 12 in 4 groups of 3",
        "padding and copies: 17.7 MB of weights over the tensor axis",
        "replicated over tensor=2: norms, 0.1 MB on every device",
        "replicated over data=2: all weights, 286.8 MB on each",
    ]
    assert notes("1x1") == []


# -- speed -----------------------------------------------------------------------------------------


def test_a_step_reads_the_weights_once_and_the_pages_of_every_row() -> None:
    """Llama 3.1 8B on one H200, 64 rows of 1,256 tokens: all weights but the embedding, which is
    looked up; the tokens of every row and the new one; the logits in float32, written and read."""
    plan = planned("llama-3.1-8b", "h200")
    vocab, embed = 128_256, 4096
    weights = 2 * (8_030_261_248 - vocab * embed)
    pages = 64 * (1256 + 1) * 131_072
    assert plan.sequences_expected == 64
    assert plan.hbm_bytes_per_step == weights + pages + 2 * 64 * vocab * 4
    matrices = 8_030_261_248 - vocab * embed - 65 * embed
    attention = 32 * 2 * 2 * 32 * 128 * 1256
    assert plan.flops_per_step == 64 * (2 * matrices + attention)
    memory_s = plan.hbm_bytes_per_step / (0.9 * 4.8e12)
    assert plan.step_ms == pytest.approx(1e3 * memory_s)
    assert plan.limit == "memory"
    assert plan.tokens_per_s_per_user == pytest.approx(1 / memory_s)
    assert plan.tokens_per_s_total == pytest.approx(64 / memory_s)
    assert plan.collective_bytes == {"data": 0, "tensor": 0}


def test_a_step_reads_the_experts_that_its_tokens_take() -> None:
    """Qwen3-30B-A3B, 2 rows of 1,256 tokens: of 128 experts a token takes 8, so that both miss one
    with a chance of (15/16)**2. All else is read as ever."""
    plan = planned("qwen3-30b-a3b", "h200", max_rows=2)
    vocab, embed, layers = 151_936, 2048, 48
    experts = layers * 128 * 3 * 768 * embed
    others = 30_532_122_624 - experts - vocab * embed
    taken = 2 * experts - int(2 * experts * (15 / 16) ** 2)
    pages = 2 * (1256 + 1) * 98_304
    logits = 2 * 2 * vocab * 4
    assert plan.hbm_bytes_per_step == pytest.approx(2 * others + taken + pages + logits, rel=1e-6)
    many = planned("qwen3-30b-a3b", "h200")
    assert many.hbm_bytes_per_step is not None
    share = 1 - (15 / 16) ** many.sequences_expected
    assert 0.98 < share < 1
    assert plan.flops_per_step is not None
    active = 2 * 2 * (others - 97 * embed - 48 * 2 * 128 + experts // 16)
    attention = 2 * layers * 2 * 2 * 32 * 128 * 1256
    assert plan.flops_per_step == active + attention


def test_experts_have_a_note_where_plain_xla_computes_them() -> None:
    runner = memory_of("tiny-mixtral", "1x1").runner
    (note,) = layout_notes(runner, parse_mesh("1x1"))
    assert note.startswith("experts: 2 of 4 are counted for each token")
    assert "plain XLA multiplies by all 4" in note


def test_a_window_is_all_that_is_read_of_a_long_context() -> None:
    """tiny-gemma3: one of two layers sees 32 tokens, the other all 256 + 256."""
    plan = planned("tiny-gemma3", "h200", max_rows=1, dtype="float32")
    weights = 4 * plan.params
    token = 2 * 1 * 32 * 4
    logits = 2 * 512 * 4
    assert plan.hbm_bytes_per_step == weights + token * (32 + 512 + 2) + logits


def test_the_first_token_comes_after_the_chunks_of_its_prompt() -> None:
    """1,000 tokens are chunks of 512 and 488, which is computed as 512. Both are limited by their
    products: 2 for each weight of a matrix and place, the head for 16 lines; attention in float32
    over 512 and 1,000 keys. On one device nothing is exchanged."""
    vocab, embed = 128_256, 4096
    matrices = 8_030_261_248 - 2 * vocab * embed - 65 * embed
    products = 2 * 2 * (512 * matrices + 16 * vocab * embed)
    attention = 32 * 2 * 2 * 32 * 128 * 512 * (512 + 1000)
    seconds = (products / 989e12 + attention / 67e12) / 0.8
    assert planned("llama-3.1-8b", "h200").ttft_ms == pytest.approx(1e3 * seconds)


def test_exchanges_come_on_top() -> None:
    """65 all-reduces of 64 x 4,096 bfloat16 send 2 x 7/8 of it, and an all-gather 7 x 64 x 3 int32;
    66 latencies."""
    plan = planned("llama-3.1-8b", "h100", "1x8")
    sent = 65 * 2 * 7 * 64 * 4096 * 2 // 8 + 7 * 64 * 3 * 4
    assert plan.collective_bytes == {"data": 0, "tensor": sent}
    roofline = plan.details.roofline
    assert roofline is not None
    assert roofline.link_s == pytest.approx(sent / (450e9 * 0.8) + 66 * 15e-6)
    assert plan.step_ms == pytest.approx(1e3 * (roofline.memory_s + roofline.link_s))


def test_a_tensor_axis_wider_than_a_host_goes_over_the_network() -> None:
    near, far = planned("llama-3.1-8b", "h100", "1x8"), planned("llama-3.1-8b", "h100", "1x16")
    assert near.details.roofline is not None
    assert far.details.roofline is not None
    assert far.collective_bytes is not None
    expected = far.collective_bytes["tensor"] / (50e9 * 0.8) + 66 * 15e-6
    assert far.details.roofline.link_s == pytest.approx(expected)


def test_data_shards_take_their_own_rows_at_the_same_speed() -> None:
    one, two = planned("llama-3.1-8b", "h200", "1x2"), planned("llama-3.1-8b", "h200", "2x2")
    assert two.step_ms == one.step_ms
    assert two.sequences_expected == 2 * one.sequences_expected
    assert (two.nearest_fit, two.mesh) == ("1x1", "2x2")


def test_simulated_devices_share_one_machine() -> None:
    cpu = replace(device_facts("cpu"), memory_bytes=8 * 10**9)
    one, two = planned_on("tiny-llama", cpu), planned_on("tiny-llama", cpu, "2x1")
    assert two.details.memory.budget.free_bytes * 2 == one.details.memory.budget.free_bytes
    assert one.details.roofline is not None
    assert two.details.roofline is not None
    assert two.details.roofline.memory_s == pytest.approx(2 * one.details.roofline.memory_s)


@pytest.mark.parametrize(
    ("times", "limit", "total"),
    [((3.0, 2.0, 1.0), "memory", 4.0), ((1.0, 5.0, 2.0), "compute", 7.0)],
)
def test_memory_and_products_overlap_and_exchanges_do_not(
    times: tuple[float, float, float], limit: str, total: float
) -> None:
    roofline = Roofline(memory_s=times[0], compute_s=times[1], link_s=times[2])
    assert (roofline.limit, roofline.total_s) == (limit, total)
    assert Roofline(memory_s=1.0, compute_s=1.0, link_s=2.0).limit == "link"
