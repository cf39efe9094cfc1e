"""The decoder on tiny random models of every family: its forms agree, its parts are wired up.

That the numbers are those of the published architectures is shown in ``test_parity_tiny.py``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.models.decoder import Model, Params
from jaxserve.models.presets import PRESETS, preset
from pallas_kernels.quantized_matmul import Products

TINY = [name for name in PRESETS if name.startswith("tiny-")]
TOKENS = np.random.default_rng(3).integers(0, 512, (2, 80))


@lru_cache(maxsize=32)
def model_of(name: str) -> Model:
    return Model(preset(name))


@lru_cache(maxsize=32)
def random_params(name: str, *, stacked: bool = False, dtype: Any = jnp.float32) -> Params:
    return model_of(name).init(jax.random.key(0), dtype, stacked=stacked)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-gemma3"])
def test_stacked_and_unrolled_layers_give_the_same_logits(name, dense_logits):
    """The same weights in both forms; XLA may order sums differently, hence not bit for bit."""
    model = model_of(name)
    unrolled = random_params(name)
    stacked = Params(unrolled.ends, jax.tree.map(lambda *x: jnp.stack(x), *unrolled.layers))

    one, other = dense_logits(model, stacked, TOKENS), dense_logits(model, unrolled, TOKENS)

    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * other.std())


@pytest.mark.parametrize("name", ["tiny-gemma3", "tiny-qwen2"])
def test_init_draws_the_same_weights_stacked_or_not(name):
    stacked, unrolled = random_params(name, stacked=True), random_params(name)
    assert isinstance(stacked.layers, dict)
    for number, layer in enumerate(unrolled.layers):
        jax.tree.map(
            np.testing.assert_array_equal, {k: v[number] for k, v in stacked.layers.items()}, layer
        )
    jax.tree.map(np.testing.assert_array_equal, stacked.ends, unrolled.ends)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("stacked", [True, False])
def test_abstract_shapes_and_axes_describe_what_init_makes(name, stacked):
    model = model_of(name)
    abstract = model.abstract(jnp.bfloat16, stacked=stacked)
    init = partial(model.init, dtype=jnp.bfloat16, stacked=stacked)
    made = jax.eval_shape(init, jax.random.key(0))
    axes = model.logical_axes(stacked=stacked)
    config = preset(name)
    sizes = {
        "layer": config.layers,
        "embed": config.embed,
        "q_heads": config.q_heads,
        "kv_heads": config.kv_heads,
        "group": config.group + 2,
        "head_dim": config.head_dim,
        "ffn": config.ffn,
        "vocab": config.vocab_size,
        None: 2,
    }

    def check(shape: Any, array: Any, words: Any) -> None:
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert array.shape == tuple(sizes[word] for word in words)

    jax.tree.map(check, abstract, made, axes)


@pytest.mark.parametrize("name", TINY)
def test_random_weights_give_spread_but_not_degenerate_logits(name, dense_logits):
    """Neither flat nor a constant answer, so that tests on them can tell right from wrong."""
    logits = dense_logits(model_of(name), random_params(name), TOKENS)
    answers = logits.argmax(-1)
    assert 1.0 < logits.std() < 4.0
    assert len(np.unique(answers)) > 20
    assert (answers == TOKENS).mean() < 0.2


@pytest.mark.parametrize("stacked", [True, False])
def test_the_cache_goes_through_every_layer_in_order(stacked, dense_attend):
    config = preset("tiny-gemma3")
    model, dense = Model(config), dense_attend(config)

    def attend(cache: Any, layer: Any, *heads: Any) -> tuple[Any, Any]:
        count, log = cache
        out, _ = dense((), layer, *heads)
        window = heads[-1]
        return out, (count + 1, log.at[count].set(jnp.stack([layer, window])))

    run = jax.jit(partial(model.forward, attend=attend, tensor_axis=None))
    _, (count, log) = run(
        random_params("tiny-gemma3", stacked=stacked),
        jnp.zeros((1, 4), jnp.int32),
        jnp.arange(4)[None],
        (jnp.int32(0), jnp.zeros((2, 2), jnp.int32)),
    )
    assert count == 2
    np.testing.assert_array_equal(log, [[0, 32], [1, 0]])


def test_unrolled_layers_are_traced_once_for_each_window(dense_attend):
    """Tracing thirty layers one by one took longer than a warm start may; the window stays an int,
    so that an implementation may choose by it while it is traced."""
    config = replace(preset("tiny-gemma3"), layers=6, windows=(32, 32, 0, 32, 32, 0))
    dense, seen = dense_attend(config), []

    def attend(cache: Any, layer: Any, *heads: Any) -> tuple[Any, Any]:
        seen.append(heads[-1])
        return dense(cache, layer, *heads)

    model, zeros = Model(config), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    run = partial(model.forward, attend=attend, tensor_axis=None)
    jax.eval_shape(run, model.abstract(jnp.float32, stacked=False), zeros, zeros, ())
    assert sorted(seen) == [0, 32]


def test_a_window_hides_what_is_further_back(dense_logits):
    """In one layer of window 32, token 40 cannot depend on token 8 and does on token 9."""
    config = replace(preset("tiny-mistral"), layers=1, windows=(32,))
    model = Model(config)
    params = model.init(jax.random.key(1), jnp.float32, stacked=False)
    base = np.array(TOKENS[0, :41])
    changed = {}
    for position in (8, 9):
        other = base.copy()
        other[position] = (other[position] + 1) % 512
        difference = dense_logits(model, params, other)[40] - dense_logits(model, params, base)[40]
        changed[position] = np.abs(difference).max()
    assert changed[8] == 0
    assert changed[9] > 1e-4


def test_positions_decide_and_not_places_in_the_batch(dense_logits, dense_attend):
    """Rope is relative: a shift of all positions moves no logit."""
    model, params = model_of("tiny-llama"), random_params("tiny-llama")
    here = dense_logits(model, params, TOKENS)
    there = dense_logits(model, params, TOKENS, np.arange(80) + 300)
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-3 * here.std())


def test_logits_are_float32_and_capped_when_the_config_says_so():
    config = replace(preset("tiny-llama"), logit_softcap=0.5)
    params = random_params("tiny-llama", dtype=jnp.bfloat16)
    hidden = jnp.full((3, 64), 4.0, jnp.bfloat16)
    plain = model_of("tiny-llama").logits(params, hidden)
    capped = Model(config).logits(params, hidden)
    assert plain.dtype == capped.dtype == jnp.float32
    assert np.abs(plain).max() > 0.5
    np.testing.assert_allclose(capped, 0.5 * np.tanh(plain / 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-phi3"])
def test_some_logits_are_those_among_all_of_them(name):
    """Tied and untied, in vocabulary chunks and one token per place, capped alike."""
    model = Model(replace(preset(name), logit_softcap=3.0))
    params = random_params(name)
    hidden = jax.random.normal(jax.random.key(3), (5, 64))
    targets = jnp.array([0, 511, 7, 7, 300])
    every = np.asarray(model.logits(params, hidden))

    chunk = model.partial_logits(model.head_weight(params)[128:256], hidden)
    each = model.target_logits(params, hidden, targets)

    np.testing.assert_allclose(chunk, every[:, 128:256], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(each, every[np.arange(5), targets], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [None, 1, 300])
@pytest.mark.parametrize(
    ("softcap", "implementation"), [(0.0, "auto"), (0.0, "xla"), (3.0, "auto")], ids=str
)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-phi3"])
def test_the_best_logit_is_that_of_all_logits_to_the_bit(name, softcap, implementation, count):
    model = Model(replace(preset(name), logit_softcap=softcap))
    params = random_params(name)
    hidden = jax.random.normal(jax.random.key(3), (5, 64)).at[1, 2].set(jnp.inf)
    products = Products(implementation)

    @jax.jit
    def both(params, hidden):
        lazy = model.lazy_logits(params, hidden, products=products)
        return lazy.best(count), lazy.every()

    best, every = both(params, hidden)
    some = np.asarray(every)[:, :count]
    assert every.shape == (5, 512)
    np.testing.assert_array_equal(best.is_finite, np.isfinite(some).all(axis=-1))
    sound = np.asarray(best.is_finite)
    assert sound.sum() >= 4
    np.testing.assert_array_equal(best.answer[sound], some[sound].max(axis=-1))
    np.testing.assert_array_equal(best.place[sound], some[sound].argmax(axis=-1))


def test_bfloat16_stays_close_to_float32(dense_logits):
    """Rounded weights and activations, but no sum in bfloat16: 3 % of the spread is typical."""
    model, params = model_of("tiny-llama"), random_params("tiny-llama")
    exact = dense_logits(model, params, TOKENS)
    rounded = dense_logits(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), TOKENS)
    assert np.abs(rounded - exact).mean() < 0.05 * exact.std()


def mesh_of(tensor: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:tensor]), ("tensor",))


def specs_of(model: Model, stacked: bool) -> Params:
    split = {"kv_heads", "q_heads", "ffn", "vocab"}
    return jax.tree.map(
        lambda axes: PartitionSpec(*("tensor" if word in split else None for word in axes)),
        model.logical_axes(stacked=stacked),
        # The tuple of all layers holds dicts, a tuple of axes holds words.
        is_leaf=lambda leaf: isinstance(leaf, tuple) and not isinstance(leaf[0], dict),
    )


def sharded_logits(model: Model, attend: Any, tensor: int, stacked: bool) -> Any:
    def run(params: Params, tokens: Any, positions: Any) -> Any:
        hidden, _ = model.forward(params, tokens, positions, (), attend, tensor_axis="tensor")
        return model.logits(params, hidden)

    return jax.shard_map(
        run,
        mesh=mesh_of(tensor),
        in_specs=(specs_of(model, stacked), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, None, "tensor"),
    )


@pytest.mark.parametrize(("tensor", "stacked"), [(2, True), (4, False)])
def test_a_tensor_mesh_gives_the_logits_of_one_device(tensor, stacked, dense_logits, dense_attend):
    config = replace(preset("tiny-qwen2"), q_heads=8, kv_heads=4)
    model = Model(config)
    params = model.init(jax.random.key(2), jnp.float32, stacked=stacked)
    positions = jnp.broadcast_to(jnp.arange(80, dtype=jnp.int32)[None], (2, 80))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh_of(tensor), spec), specs_of(model, stacked)
    )
    run = sharded_logits(model, dense_attend(config), tensor, stacked)

    logits = jax.jit(run)(jax.device_put(params, shardings), jnp.array(TOKENS), positions)

    expected = dense_logits(model, params, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * expected.std())


@pytest.mark.parametrize(("stacked", "bodies"), [(True, 1), (False, 2)])
def test_a_layer_has_exactly_two_all_reduces(stacked, bodies, dense_attend):
    """A scanned body stands in the program once, unrolled layers one by one; the ends add one."""
    config = preset("tiny-llama")
    model = Model(config)
    run = sharded_logits(model, dense_attend(config), 2, stacked)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    jaxpr = jax.make_jaxpr(run)(model.abstract(jnp.float32, stacked=stacked), tokens, tokens)
    names = list(primitives(jaxpr.jaxpr))
    assert sum(name.startswith("psum") for name in names) == 1 + 2 * bodies
    collectives = ("all_gather", "all_to_all", "ppermute", "reduce_scatter")
    assert not [name for name in names if name.startswith(collectives)]


def primitives(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)
