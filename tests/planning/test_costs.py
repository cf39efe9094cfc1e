"""Counts from traces, against formulas and against what XLA counts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxserve.models.decoder import Model
from jaxserve.models.presets import preset
from jaxserve.planning.costs import Costs, costs_from, count, peak_bytes, step_body
from jaxserve.planning.speed import decode_costs
from jaxserve.runner.config import ProgramKey
from jaxserve.runner.executables import ExecutableFolder
from pallas_kernels.quantized_matmul import best_product, feed_forward, quantized_matmul
from tests.pallas_kernels.native_here import needs_native
from tests.planning.planned import memory_of

pytestmark = pytest.mark.slow

N = 64
F32 = 4


def jaxpr_of(function: Any, *arguments: jax.ShapeDtypeStruct) -> Any:
    return jax.jit(function).trace(*arguments).jaxpr


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def decode(model: str, mesh: str, rows: int) -> Costs:
    runner = memory_of(model, mesh, max_rows=rows).runner
    traced = runner.trace(ProgramKey(rows, "decode", rows, 1))
    return count(step_body(traced.jaxpr), runner.mesh_shape)


def test_beside_files_of_programs_costs_are_counted_once(tmp_path: Path) -> None:
    runner = memory_of("tiny-llama", max_rows=4).runner
    runner.use(ExecutableFolder(tmp_path / "programs", {"jax": "1"}))
    counted = decode_costs(runner, 4, 100)
    trace, runner.trace = runner.trace, lambda key: pytest.fail(f"{key} was traced")
    assert decode_costs(runner, 4, 100) == counted
    for path in (tmp_path / "programs").iterdir():
        path.write_text(path.read_text().replace("opaque", "other"))
    runner.trace = trace
    assert decode_costs(runner, 4, 100) == counted


@pytest.mark.parametrize("fields", [None, [], {}, {"flops": 1}, "flops"])
def test_costs_are_made_of_their_fields_alone(fields: object) -> None:
    costs = Costs(Counter(float32=7), Counter(tensor=3), Counter(tensor=1), 2)
    assert costs_from(json.loads(json.dumps(vars(costs)))) == costs
    assert costs_from(fields) is None


@pytest.mark.parametrize(
    "damage", [{"opaque": None}, {"opaque": "2"}, {"flops": {"float32": "7"}}, {"exchanges": [1]}]
)
def test_costs_are_not_made_of_what_is_no_number(damage: dict[str, Any]) -> None:
    costs = Costs(Counter(float32=7), Counter(tensor=3), Counter(tensor=1), 2)
    assert costs_from(vars(costs) | damage) is None


# -- products --------------------------------------------------------------------------------------


def test_a_product_counts_two_for_each_pair_and_goes_by_the_dtype_of_its_operands() -> None:
    def products(x: Any, y: Any) -> Any:
        return jnp.einsum("ij,jk->ik", x, y).astype(jnp.bfloat16) @ y.astype(jnp.bfloat16)

    costs = count(jaxpr_of(products, floats(3, 5), floats(5, 5)), {})
    assert costs.flops == {"float32": 2 * 3 * 5 * 5, "bfloat16": 2 * 3 * 5 * 5}


def test_a_loop_over_layers_is_multiplied_by_its_length() -> None:
    def layers(x: Any, weights: Any) -> Any:
        return lax.scan(lambda y, w: (y @ w, None), x, weights)[0]

    costs = count(jaxpr_of(layers, floats(2, N), floats(7, N, N)), {})
    assert costs.flops == {"float32": 7 * 2 * 2 * N * N}


def test_the_cheapest_branch_counts() -> None:
    def branch(x: Any) -> Any:
        return lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x)

    assert not count(jaxpr_of(branch, floats(N, N)), {}).flops


def test_a_loop_of_unknown_length_is_not_counted_but_told() -> None:
    def loops(x: Any, turns: Any) -> Any:
        def layer(y: Any, _: None) -> Any:
            return lax.fori_loop(0, turns, lambda i, z: z @ z, y), None

        return lax.scan(layer, x, None, length=3)[0]

    costs = count(jaxpr_of(loops, floats(N, N), jax.ShapeDtypeStruct((), jnp.int32)), {})
    assert (costs.opaque, costs.flops.total()) == (3, 0)


@pytest.mark.parametrize("rows", [4, 16])
def test_a_decode_step_has_two_flops_for_each_weight_of_a_matrix_and_token(rows: int) -> None:
    """tiny-llama: 2 layers of qkv 64 x 128, o 64 x 64, gate and up 256 x 64, down 64 x 128; the
    head is 512 x 64. Attention is left out: one loop in each layer."""
    layer = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 2 * 128 * 64 + 128 * 64
    costs = decode("tiny-llama", "1x1", rows)
    assert costs.flops == {"float32": 2 * rows * (2 * layer + 512 * 64)}
    assert costs.opaque == 2
    assert not costs.wire_bytes


@needs_native
def test_native_products_have_two_flops_for_each_weight_and_row() -> None:
    rows, depth, hidden, out = 5, 64, 96, 32
    x, gate_up, down = floats(rows, depth), floats(2 * hidden, depth), floats(out, hidden)
    native = {"implementation": "native"}
    costs = count(jaxpr_of(partial(quantized_matmul, **native), x, gate_up), {})
    assert costs == Costs(Counter(float32=2 * rows * depth * 2 * hidden))
    assert count(jaxpr_of(partial(best_product, **native), x, gate_up), {}) == costs
    run = partial(feed_forward, activation="silu", **native)
    both = costs + Costs(Counter(float32=2 * rows * hidden * out))
    assert count(jaxpr_of(run, x, gate_up, down), {}) == both


def test_products_are_what_xla_counts_in_an_unrolled_program() -> None:
    """XLA counts what is done element by element, too; with wide matrices that is little."""
    tiny = preset("tiny-llama")
    config = replace(tiny, embed=256, ffn=1024, head_dim=64, vocab_size=4096)
    model = Model(config)

    def attend(cache: Any, layer: Any, q: Any, k: Any, v: Any, *others: Any) -> Any:
        return q, cache

    def forward(params: Any, tokens: Any) -> Any:
        x, _ = model.forward(params, tokens, tokens, None, attend, tensor_axis=None)
        return model.logits(params, x)

    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    counted = {}
    for stacked in (False, True):
        traced = jax.jit(forward).trace(model.abstract(jnp.float32, stacked=stacked), tokens)
        counted[stacked] = count(traced.jaxpr, {}).flops.total()
        if not stacked:
            analysis: Any = traced.lower().compile().cost_analysis()
            assert counted[stacked] == pytest.approx(analysis["flops"], rel=0.03)
    assert counted[True] == counted[False]


# -- exchanges -------------------------------------------------------------------------------------


def test_a_ring_sends_nearly_twice_an_all_reduce_and_every_part_of_an_all_gather() -> None:
    mesh = AbstractMesh((2, 4), ("data", "tensor"))
    spec = PartitionSpec("data", "tensor")

    def exchange(x: Any) -> Any:
        total = lax.psum(x, "tensor") + lax.pmax(x, "tensor")
        return total + jnp.sum(lax.all_gather(x, "data"), axis=0)

    mapped = partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    array = jax.ShapeDtypeStruct((8, N), jnp.float32, sharding=NamedSharding(mesh, spec))
    costs = count(step_body(jaxpr_of(mapped(exchange), array)), mesh.shape)
    part = 4 * (N // 4) * F32
    assert costs.wire_bytes == {"tensor": 2 * (2 * 3 * part // 4), "data": 1 * part}
    assert costs.exchanges == {"tensor": 2, "data": 1}


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_decode_step_has_two_all_reduces_per_layer(tensor: int) -> None:
    """And one for the embedding; each of rows x embed float32. Then an all-gather of three int32
    for each row."""
    rows, embed, layers = 8, 64, 2
    costs = decode("tiny-llama", f"1x{tensor}", rows)
    all_reduce = 2 * (tensor - 1) * rows * embed * F32 // tensor
    gathered = (tensor - 1) * rows * 3 * 4
    assert costs.wire_bytes == {"tensor": (2 * layers + 1) * all_reduce + gathered}
    assert costs.exchanges == {"tensor": 2 * layers + 2}


def test_an_exchange_that_is_not_known_is_not_passed_over() -> None:
    mesh = AbstractMesh((1, 4), ("data", "tensor"))
    spec = PartitionSpec("tensor")

    def shift(x: Any) -> Any:
        return lax.ppermute(x, "tensor", [(0, 1)])

    mapped = jax.shard_map(shift, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    array = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, spec))
    with pytest.raises(AssertionError, match="wire bytes of ppermute are not known"):
        count(step_body(jaxpr_of(mapped, array)), mesh.shape)


def test_costs_add_up() -> None:
    one = Costs(Counter({"float32": 3}), Counter({"tensor": 5}), Counter({"tensor": 1}), 2)
    assert one + one == one.times(2)
    assert one.times(2).flops == {"float32": 6}


# -- temporaries -----------------------------------------------------------------------------------


def test_arrays_live_from_where_they_are_made_to_where_they_are_used_last() -> None:
    """While ``c`` is made, ``a`` and ``b`` are there; ``a`` is gone when ``d`` is."""

    def chain(x: Any) -> Any:
        a = x * 2.0
        b = a + 1.0
        c = a * b
        return c + b

    assert peak_bytes(jaxpr_of(chain, floats(N))) == 3 * N * F32


def test_updates_in_place_and_views_take_nothing() -> None:
    def write(pool: Any, value: Any) -> Any:
        return pool.at[jnp.int32(3)].set(value).reshape(-1)

    jaxpr = jaxpr_of(write, floats(1000, N), floats(N))
    assert peak_bytes(jaxpr) < 2 * N * F32


def test_a_loop_takes_one_layers_weights_and_what_its_body_makes() -> None:
    """The body's product replaces what it began from: both are there while it is computed."""

    def layers(x: Any, weights: Any) -> Any:
        return lax.scan(lambda y, w: (y @ w, None), x * 2.0, weights)[0]

    jaxpr = jaxpr_of(layers, floats(2, N), floats(7, N, N))
    assert peak_bytes(jaxpr) == N * N * F32 + 2 * 2 * N * F32


def test_stacked_results_of_a_loop_are_made_whole() -> None:
    def layers(x: Any) -> Any:
        return lax.scan(lambda y, _: (y, y * 2.0), x, None, length=7)[1]

    assert peak_bytes(jaxpr_of(layers, floats(N))) == 7 * N * F32
