"""Rotating and appending in one launch, interpreted on the CPU: numbers, races, planted faults.

``apply_rope`` and ``append`` have tests of their own; together they are the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import (
    FORMATS,
    Format,
    Pools,
    abstract_pools,
    append_mosaic,
    rope_append,
)
from pallas_kernels.paged_attention.cases import APPENDED, LAYER, Case, share_places
from pallas_kernels.paged_attention.formats import quantize
from pallas_kernels.quantized_attention.reference import quantized

from .interpreting import Fault, assert_caught, interpret, interpreted

BY_NAME = {case.name: case for case in APPENDED}
RAGGED, WIDE, DECODE = "append-128-page16-ragged", "append-64-page16-wide", "append-64-page16"
INTERPRETED = (
    # Case, pages. Every case with floats, and every format with every kind and head_dim.
    *((name, "float16" if "96" in name else "bfloat16") for name in BY_NAME),
    *((name, "int8") for name in BY_NAME if "odd" not in name and "96" not in name),
    *((name, "fp8") for name in (DECODE, "append-64-page8-odd", WIDE, RAGGED)),
)
IN_EVERY_RUN = ((DECODE, "bfloat16"), (RAGGED, "int8"), (WIDE, "fp8"))


class Drawn(NamedTuple):
    """The positional arguments of ``rope_append``, and where ragged rows begin."""

    pools: Pools
    q: jax.Array
    k: jax.Array
    v: jax.Array
    rope: jax.Array
    table: jax.Array
    start: jax.Array
    length: jax.Array
    first: jax.Array | None


def draw(case: Case, pages: str, seed: int = 0) -> Drawn:
    """Draws a case. Pools hold poison wherever no row has a token, in page 0 above all."""
    inputs = case.arrays(seed=seed, dtype="float32")
    first = None
    if case.is_ragged:
        inputs, first = share_places(inputs)
    dtype = "bfloat16" if pages in FORMATS else pages
    pools = jax.tree.map(lambda cells: cells.astype(dtype), inputs.pools)
    if pages in FORMATS:
        pools = quantized(inputs.pools, FORMATS[pages])
    rng = np.random.default_rng(seed)
    places = inputs.q.shape[:2]

    def heads(count: int) -> jax.Array:
        numbers = rng.standard_normal((*places, count, case.head_dim), np.float32)
        return jnp.asarray(numbers * rng.choice([1e-3, 1.0, 30.0], (*places, count, 1)), dtype)

    angles = rng.uniform(-20, 20, (*places, case.head_dim // 2)).astype(np.float32)
    return Drawn(
        pools,
        heads(case.q_heads),
        heads(case.kv_heads),
        heads(case.kv_heads),
        jnp.stack([jnp.cos(angles), jnp.sin(angles)]),
        inputs.table,
        inputs.start,
        inputs.length,
        first,
    )


def by_mosaic(given: Drawn, run: Callable[..., Any] | None = None) -> tuple[jax.Array, Pools]:
    *arrays, first = given
    if run is None:
        return interpret(
            lambda *x: rope_append(*x, layer=LAYER, first=first, implementation="mosaic"), *arrays
        )
    return interpret(lambda *x: run(*x, layer=LAYER, first=first), *arrays)


def expect_definition(given: Drawn, run: Callable[..., Any] | None = None) -> None:
    """Compares queries, all cells of all layers, and scales."""
    *arrays, first = given
    q, pools = by_mosaic(given, run)
    expected_q, expected = jax.jit(
        lambda *x: rope_append(*x, layer=LAYER, first=first, implementation="scatter")
    )(*arrays)
    expect_same("queries", q, expected_q)
    null = LAYER * given.pools.pages
    for name in ("k", "v", "k_scale", "v_scale"):
        cells = getattr(expected, name)
        if cells is None:
            assert getattr(pools, name) is None
            continue
        # What is padding goes nowhere here, and to the null page there.
        cells = cells.at[null].set(getattr(given.pools, name)[null])
        expect_same(name, getattr(pools, name), cells)


def expect_same(name: str, ours: jax.Array, theirs: jax.Array) -> None:
    """Every bit is the same, but for one number in a thousand, which is next to the other one.

    XLA fuses a product and a sum of a rotation where it likes, and rounds once less then.
    """
    left, right = as_float(ours), as_float(theirs)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    assert np.mean(~same) <= 1e-3, f"{name}: {np.sum(~same)} of {same.size} numbers are others"
    left, right = left[~same], right[~same]
    if ours.dtype == jnp.int8:
        np.testing.assert_allclose(left, right, rtol=0, atol=1, err_msg=name)
    else:
        bits = {"float8_e4m3fn": 3, "float16": 10}.get(ours.dtype.name, 7)
        np.testing.assert_allclose(left, right, rtol=2.0**-bits, err_msg=name)


def as_float(numbers: jax.Array) -> np.ndarray:
    return np.asarray(numbers, np.float32)


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        pytest.param(*one, marks=() if one in IN_EVERY_RUN else pytest.mark.prove)
        for one in INTERPRETED
    ],
)
def test_one_launch_writes_what_the_parts_do(name: str, pages: str, seed: int) -> None:
    expect_definition(draw(BY_NAME[name], pages, seed))


@pytest.mark.prove
@pytest.mark.parametrize("pages", ["int8", "fp8"])
def test_odd_numbers_are_rounded_as_by_the_parts(pages: str) -> None:
    """Tokens of zeros, of the smallest and largest numbers, with an infinity, and with a NaN."""
    given = draw(BY_NAME["append-64-page16-chunk"], pages)
    odd = jnp.asarray([0.0, -0.0, 1e-38, 3e38, -3e38, jnp.inf, -jnp.inf, jnp.nan], given.k.dtype)
    k = given.k.at[0, :8, :, 5].set(odd[:, None]).at[1, :, :, :].set(0)
    v = given.v.at[0, :8, 0, 0].set(odd).at[1, :4, :, :].set(1e-38)
    expect_definition(given._replace(k=k, v=v))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_nan_shows_however_many_numbers_are_rounded_at_once(format: Format) -> None:
    """XLA's maximum of these passed it over."""
    numbers = jnp.ones((2, 16, 2, 64)).at[0, 7, :, 5].set(jnp.nan)
    _, scale = quantize(numbers, format)
    np.testing.assert_array_equal(jnp.argwhere(jnp.isnan(scale)), [[0, 7, 0], [0, 7, 1]])


@pytest.mark.prove
def test_a_position_without_an_entry_in_the_table_is_written_nowhere() -> None:
    given = draw(BY_NAME[DECODE], "bfloat16")
    beyond = given.table.shape[1] * given.pools.page_tokens
    expect_definition(given._replace(start=given.start.at[0].set(beyond)))


FAULTS = (
    Fault("copies not waited for", "plgpu.barrier_wait(here)", "pass"),
    Fault(
        "a copy too few waited for",
        "num_arrivals=self.copies_in + 1",
        "num_arrivals=self.copies_in",
    ),
    Fault(
        "rotated lines not committed",
        "        plgpu.commit_smem()\n        plgpu.copy",
        "        plgpu.copy",
    ),
    Fault("copies out not waited for", "        plgpu.wait_smem_to_gmem(0)\n", ""),
    Fault("lost layer", "page = base[0] + lax", "page = lax"),
    Fault("wrong slot", "slot = lax.rem(cell, ", "slot = lax.rem(cell + 1, "),
    Fault("wrong page", "lax.div(cell, jnp", "lax.div(cell + 1, jnp"),
    Fault("padding written", "@pl.when(cell != NOWHERE)", "@pl.when(cell >= NOWHERE)"),
    Fault(
        "values rotated",
        "is_turned = self._line(shape) < self.values - begin",
        "is_turned = self._line(shape) < self.lines",
    ),
    Fault(
        "a value rotated",
        "is_turned = self._line(shape) < self.values - begin",
        "is_turned = self._line(shape) <= self.values - begin",
    ),
    Fault(
        "second tile taken for the first",
        "is_turned = self._line(shape) < self.values - begin",
        "is_turned = self._line(shape) < self.values",
    ),
    Fault("turned the other way", "one * cos - two * sin", "one * cos + two * sin"),
    Fault("another place's angles", "rope.at[:, place]", "rope.at[:, 0]"),
    Fault("another place's heads", "heads.at[place]", "heads.at[0]"),
    Fault(
        "keys written as values",
        "zip(pools[:2], (self.keys, self.values), strict=True)",
        "zip(pools[:2], (self.keys, self.keys), strict=True)",
    ),
)
FAULTS_OF_SCALES = (
    Fault("lost scales", "zip(pools[2:], (self", "zip(pools[4:], (self"),
    Fault("another head's scale", '["scales"][begin + head]', '["scales"][begin]'),
    Fault("rounded towards zero", "jnp.round(ratio)", "jnp.trunc(ratio)"),
    Fault("scale not rounded", "scale = mosaic.rounded(scale, jnp.bfloat16)\n", "pass\n"),
    Fault("largest of one half", "jnp.maximum(*(", "jnp.minimum(*("),
    Fault(
        "keys not spread",
        "if self.spreads:\n                    h",
        "if False:\n                    h",
    ),
    Fault("halves the wrong way", "(one + two, one - two)", "(one + two, two - one)"),
    Fault("spread keys grow", "jnp.float32(self.head_dim**-0.5)", "jnp.float32(1)"),
    Fault(
        "values spread",
        "is_key = self._line(shape) < self.values",
        "is_key = shape[0] < self.values",
    ),
    Fault(
        "matrix not waited for",
        "self.copies_in + 1 + self.spreads",
        "self.copies_in + 1",
    ),
)


def checking(*cases: tuple[str, str]) -> Callable[[ModuleType], None]:
    def check(module: ModuleType) -> None:
        for name, pages in cases:
            expect_definition(draw(BY_NAME[name], pages), module.rope_append_mosaic)

    return check


@pytest.mark.prove
def test_every_planted_fault_is_caught() -> None:
    assert_caught(append_mosaic, FAULTS, checking((RAGGED, "bfloat16"), (WIDE, "bfloat16")))


@pytest.mark.prove
def test_every_planted_fault_of_scales_is_caught() -> None:
    assert_caught(append_mosaic, FAULTS_OF_SCALES, checking((DECODE, "int8")))


def test_a_planted_race_and_a_wrong_slot_are_caught() -> None:
    some = [
        fault for fault in FAULTS if fault.name in ("rotated lines not committed", "wrong slot")
    ]
    assert_caught(append_mosaic, some, checking((DECODE, "bfloat16")))


# -- without a GPU kernel --------------------------------------------------------------------------


def test_parts_are_chosen_on_a_cpu_and_their_padding_is_harmless() -> None:
    """Against cells written one by one."""
    given = draw(BY_NAME[RAGGED], "bfloat16")
    arrays: tuple[Any, ...] = given[:-1]
    first = given.first
    assert first is not None
    q, pools = rope_append(*arrays, layer=LAYER, first=first)
    k = np.array(as_float(given.pools.k))
    cos, sin = np.asarray(given.rope)[:, 0, :, None, :]
    one, two = np.split(as_float(given.k)[0], 2, axis=-1)
    rotated = np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)
    for b, (begin, length) in enumerate(zip(given.start, given.length, strict=True)):
        for t in range(int(length)):
            entry, slot = divmod(int(begin) + t, given.pools.page_tokens)
            page = LAYER * given.pools.pages + int(given.table[b, entry])
            k[page, :, slot] = rotated[int(first[b]) + t]
    used = np.ones(len(k), bool)
    used[LAYER * given.pools.pages] = False
    np.testing.assert_array_equal(
        as_float(pools.k)[used], as_float(jnp.asarray(k, "bfloat16"))[used]
    )
    assert q.shape == given.q.shape


@pytest.mark.parametrize(
    ("pages", "heads", "reason"),
    [
        ("int4", (4, 2, 64), "pages of int4 take heads that are spread over all channels"),
        ("float32", (4, 2, 64), "heads are bfloat16 or float16, got float32"),
        ("bfloat16", (4, 2, 24), "head_dim must be a multiple of 16 up to 256, got 24"),
        (
            "bfloat16",
            (6, 2, 96),
            "the queries of a key head must begin at a multiple of 128 bytes, and 3 of head_dim 96",
        ),
        (
            "fp8",
            (128, 128, 256),
            "128 query and 128 key/value heads of head_dim 256 need 302080 bytes of shared memory, "
            "and there are 232448",
        ),
        ("bfloat16", (160, 160, 256), "need 265216 bytes of shared memory"),
        ("int8", (4, 2, 96), "head_dim of 64, 128 or 256, got 96"),
    ],
)
def test_declines_what_it_was_not_written_for(
    pages: str, heads: tuple[int, int, int], reason: str
) -> None:
    q_heads, kv_heads, head_dim = heads
    dtype = FORMATS[pages].dtype if pages in FORMATS else jnp.dtype(pages)
    shapes = abstract_pools(
        layers=1, pages=2, kv_heads=kv_heads, page_tokens=16, head_dim=head_dim, dtype=dtype
    )
    pools = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    of = "bfloat16" if pages in FORMATS else pages
    q = jnp.zeros((1, 1, q_heads, head_dim), of)
    k = jnp.zeros((1, 1, kv_heads, head_dim), of)
    row = jnp.ones(1, jnp.int32)
    arrays = (pools, q, k, k, jnp.ones((2, 1, 1, head_dim // 2)), row[None], row, row)
    with interpreted(), pytest.raises(ExceptionGroup) as caught:
        rope_append(*arrays, layer=0, implementation="mosaic")
    assert reason in str(caught.value.exceptions[0])


@pytest.mark.parametrize(
    ("heads", "pages", "needed"),
    [
        # 128 lines and one more, the angles, and barriers, each to a whole KiB.
        ((64, 16, 128), "bfloat16", 33 * 1024 + 1024 + 1024),
        # The compiler reports 18,432 bytes for this one, and 38,912 for the next: no barriers.
        ((32, 8, 128), "bfloat16", 18_432 + 1024),
        ((32, 8, 128), "int8", 38_912 + 1024),
    ],
)
def test_shared_memory_is_counted_with_the_space_between_arrays(
    heads: tuple[int, int, int], pages: str, needed: int
) -> None:
    q_heads, kv_heads, head_dim = heads
    body = append_mosaic._Body(
        kv_heads=kv_heads,
        group=q_heads // kv_heads,
        head_dim=head_dim,
        page_tokens=16,
        dtype=jnp.dtype("bfloat16"),
        format=FORMATS.get(pages),
    )
    assert body.shared_bytes() == needed


def test_pages_of_another_dtype_than_the_heads_are_declined() -> None:
    given = draw(BY_NAME[DECODE], "bfloat16")
    pools = jax.tree.map(lambda x: x.astype(jnp.float16), given.pools)
    with interpreted(), pytest.raises(ExceptionGroup) as caught:
        rope_append(*given._replace(pools=pools)[:-1], layer=0, implementation="mosaic")
    said = "pages without scales are bfloat16, as the heads, got float16"
    assert said in str(caught.value.exceptions[0])


def test_declines_on_a_cpu() -> None:
    given = draw(BY_NAME[DECODE], "bfloat16")
    with pytest.raises(ExceptionGroup) as caught:
        rope_append(*given[:-1], layer=0, implementation="mosaic")
    assert "Mosaic kernels run on Hopper GPUs" in str(caught.value.exceptions[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": jnp.ones((2, 4, 1, 64))}, "the angles have the shape"),
        ({"q": jnp.ones((4, 1, 3, 64), jnp.bfloat16)}, "3 query heads cannot be split over 2"),
        ({"first": jnp.zeros(4, jnp.int32)}, "give as many as the table has, or one row"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    given = draw(BY_NAME[DECODE], "bfloat16")._replace(**change)
    with pytest.raises(ValueError, match=message):
        rope_append(*given[:-1], layer=0, first=given.first)
