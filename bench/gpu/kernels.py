"""Kernels on the device: that they agree with their references, and how fast they are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.limits import memory_limit_s
from bench.gpu.part import Number, Setting
from bench.gpu.timing import seconds_per_call
from bench.kernels import bytes_moved, layer_step
from jaxserve.engine.constraint import mask_words
from jaxserve.engine.step import Column, RowTable, StepShape
from jaxserve.models.decoder import Logits
from jaxserve.runner.sampling import Lines, choose
from jaxserve.runner.vocab import VocabShard
from pallas_kernels.paged_attention import IMPLEMENTATIONS, Pools, paged_attention, pool_shape
from pallas_kernels.paged_attention.cases import CASES, LAYERS, Case, Inputs, Row

TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-2}
"""Norm of the difference over the norm of the reference. XLA may multiply float32 in TF32, which
has 10 bits of mantissa: 3e-4 in one product, and there are two; answers are rounded to bfloat16."""
TOKENS_OFF = 0.02
"""Rounding moves a sampled token only at a near tie: see ARCHITECTURE.md, "Gumbel-max"."""
AGREEING_ROWS = 64
VOCAB = 128_256
HEADS = (32, 8, 128)
"""Query heads, key/value heads and head size of a model of 8B parameters."""
SHAPES = ((256, 1024, 32), (64, 8192, 32), (16, 32768, 32), (64, 8192, 16), (64, 8192, 64),
          (64, 8192, 128))  # fmt: skip
"""Rows, context tokens, page tokens. All have as many bytes, but for the first, which has half."""
DRY_SHAPES = ((2, 64, 16),)
MODES = {
    "greedy": {},
    "temperature": {Column.TEMPERATURE_BITS: 0.8},
    "top-k and top-p": {Column.TEMPERATURE_BITS: 0.8, Column.TOP_P_BITS: 0.9, Column.TOP_K: 40},
    "greedy with log-probabilities": {Column.LOGPROBS: 5},
}
"""Columns of every line that differ from a greedy one's."""


def agreement(setting: Setting) -> Iterator[Number]:
    """Every kernel that runs here, against its reference in float32 on the CPU.

    Raises:
        AssertionError: one is further off than is tolerated.
    """
    cases = [case for case in CASES if not setting.dry or case.name == "tiny"]
    too_far = []
    for dtype in TOLERANCE:
        with ThreadPoolExecutor() as pool:  # Most of it is compiling.
            errors = list(pool.map(partial(_attention_errors, dtype=dtype), cases))
        for name in sorted(set().union(*errors)):
            worst = max(found.get(name, 0.0) for found in errors)
            number = Number(f"attention {name} {dtype}", worst, "error", TOLERANCE[dtype])
            yield number
            if worst > TOLERANCE[dtype]:
                too_far.append(f"{number.name} {worst:.2g}")
    off = _tokens_off(setting.pick(VOCAB, 512))
    yield Number("sampled tokens", off, "share off", TOKENS_OFF)
    if off > TOKENS_OFF:
        too_far.append(f"sampled tokens {off:.2g}")
    assert not too_far, f"further from the reference than is tolerated: {', '.join(too_far)}"


def _attention_errors(case: Case, dtype: str) -> dict[str, float]:
    """By implementation: how far its answers are from the reference's."""
    inputs = case.arrays(seed=0, dtype=dtype)
    exact = jax.device_put(_upcast(inputs), jax.devices("cpu")[0])
    reference = np.asarray(_attend(case, exact, "reference"), np.float64)
    errors = {}
    for name in IMPLEMENTATIONS.keys() - {"reference"}:
        try:
            answer = np.asarray(_attend(case, inputs, name), np.float64)
        except ExceptionGroup:
            continue  # It declined: not for this device or these shapes.
        error = np.linalg.norm(answer - reference) / np.linalg.norm(reference)
        errors[name] = float(error) if np.isfinite(error) else 1e9
    return errors


def _upcast(inputs: Inputs) -> Inputs:
    pools = inputs.pools
    return inputs._replace(
        q=inputs.q.astype(jnp.float32),
        pools=replace(pools, k=pools.k.astype(jnp.float32), v=pools.v.astype(jnp.float32)),
    )


def _attend(case: Case, inputs: Inputs, implementation: str) -> jax.Array:
    @jax.jit
    def run(inputs: Inputs) -> jax.Array:
        return paged_attention(
            *inputs,
            layer=1,
            scale=case.scale,
            window=case.window,
            softcap=case.softcap,
            implementation=implementation,
        )

    return run(inputs)


def _tokens_off(vocab_size: int) -> float:
    """Share of rows whose sampled token is another one on the CPU."""
    rows = AGREEING_ROWS
    run, state = _sampler(rows, vocab_size)
    arguments = (_lines(rows, vocab_size, MODES["temperature"]), *state)
    here = np.asarray(run(*arguments))
    there = np.asarray(run(*jax.device_put(arguments, jax.devices("cpu")[0])))
    return float(np.mean(here[:, 0] != there[:, 0]))


def attention(setting: Setting) -> Iterator[Number]:
    """Bandwidth of one layer's append and attention in decoding, by context and page size."""
    for rows, context, page_tokens in setting.pick(SHAPES, DRY_SHAPES):
        case = _decode_case(rows, context, page_tokens, setting.pick(HEADS, (4, 2, 16)))
        dtype = setting.pick("bfloat16", "float32")
        run = layer_step(case, _device_inputs(case, dtype), "auto", "auto")
        seconds = seconds_per_call(run, calls=setting.pick(5, 2))
        name = f"{rows} rows of {context}, pages of {page_tokens}"
        moved = bytes_moved(case, jnp.dtype(dtype), jnp.dtype(dtype))
        limit = None if setting.facts is None else setting.facts.memory_bytes_per_s / 1e9
        yield Number(name, moved / seconds / 1e9, "GB/s", limit)


def _decode_case(rows: int, context: int, page_tokens: int, heads: tuple[int, int, int]) -> Case:
    q_heads, kv_heads, head_dim = heads
    return Case(
        name=f"decode-{rows}-at-{context}",
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        table_width=-(-context // page_tokens),
        query_tokens=1,
        rows=(Row(context - 1, 1),) * rows,
    )


def _device_inputs(case: Case, dtype: str) -> Inputs:
    """As ``case.arrays``, made on the device: a pool of gigabytes takes the host minutes."""
    width, rows = case.table_width, len(case.rows)
    pages = 1 + rows * width
    shape = pool_shape(
        layers=LAYERS,
        pages=pages,
        kv_heads=case.kv_heads,
        page_tokens=case.page_tokens,
        head_dim=case.head_dim,
    )
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, jnp.dtype(dtype)), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(0), 3)
    scattered = np.random.default_rng(0).permutation(np.arange(1, pages, dtype=np.int32))
    return Inputs(
        q=draw(keys[0], (rows, 1, case.q_heads, case.head_dim)),
        pools=Pools(k=draw(keys[1], tuple(shape)), v=draw(keys[2], tuple(shape)), pages=pages),
        table=jnp.asarray(scattered.reshape(rows, width)),
        start=jnp.asarray([row.start for row in case.rows], jnp.int32),
        length=jnp.asarray([row.length for row in case.rows], jnp.int32),
    )


def sampling(setting: Setting) -> Iterator[Number]:
    """Choosing a token for every row; the limit reads the logits once."""
    vocab_size = setting.pick(VOCAB, 512)
    for rows in setting.pick((1, 64, 256), (AGREEING_ROWS,)):
        run, state = _sampler(rows, vocab_size)
        least_s = memory_limit_s(rows * vocab_size * 4, setting.facts)
        limit = None if least_s is None else least_s * 1e6
        for mode, columns in MODES.items():
            call = partial(run, _lines(rows, vocab_size, columns), *state)
            seconds = seconds_per_call(call, calls=setting.pick(20, 2))
            yield Number(f"{mode}, {rows} rows", seconds * 1e6, "us", limit)


def _lines(rows: int, vocab_size: int, columns: Mapping[Column, float]) -> jax.Array:
    """The packed lines of rows with these parameters, every one with its own seed."""
    shape = StepShape(
        max_rows=rows,
        table_width=0,
        vocab_size=vocab_size,
        decode_buckets=(rows,),
        prefill_buckets=(),
    )
    lines = RowTable(shape).lines[:rows]
    lines[:, Column.SEED_LOW] = np.arange(rows)
    neutral = {Column.TOP_P_BITS: 1.0, Column.REPETITION_BITS: 1.0}
    neutral |= {Column.SAMPLES: 1, Column.LOGPROBS: -1}
    for column, value in {**neutral, **columns}.items():
        is_float = column.name.endswith("_BITS")
        lines[:, column] = np.float32(value).view(np.int32) if is_float else int(value)
    return jnp.asarray(lines)


def _sampler(rows: int, vocab_size: int) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]:
    """The sampler of packed lines, and what else it takes: random logits, no counts, no
    biases, no masks."""
    logits = 4.0 * jax.random.normal(jax.random.key(2), (rows, vocab_size), jnp.float32)
    counts = jnp.zeros((rows + 1, vocab_size), jnp.int32)
    bias = jnp.zeros((rows + 1, vocab_size), jnp.float32)

    masks = jnp.zeros((rows + 1, mask_words(vocab_size)), jnp.int32)

    @jax.jit
    def run(
        packed: jax.Array,
        logits: jax.Array,
        counts: jax.Array,
        bias: jax.Array,
        masks: jax.Array,
    ) -> jax.Array:
        vocab = VocabShard(vocab_size)
        return choose(Logits.of(logits), Lines(packed), counts, bias, masks, vocab)

    return run, (logits, counts, bias, masks)
