"""Stretched axes: what is added is zero, what is copied is dealt out, and nothing is lost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.models.layout import Layout, choose_layout
from jaxserve.models.presets import PRESETS, preset
from tests.models.shrinking import shrink

ODD = replace(preset("tiny-llama"), q_heads=9, kv_heads=3, ffn=10, vocab_size=13)
SHAPES = {
    ("kv_heads", "group", "head_dim", "embed"): (3, 5, 2, 3),
    ("kv_heads", "group", "head_dim"): (3, 5, 2),
    ("embed", "q_heads", "head_dim"): (3, 9, 2),
    (None, "ffn", "embed"): (2, 10, 3),
    ("embed", "ffn"): (3, 10),
    ("vocab", "embed"): (13, 3),
    ("embed",): (3,),
}
LAYOUTS = [Layout(ODD, tensor, copies) for tensor in (1, 2, 3, 4, 5, 8) for copies in (1, 2, 3)]


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    """Different numbers in every place, none of them 0."""
    return 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("name", "tensor", "copies", "groups", "group"),
    [
        ("smollm2-135m", 1, 1, 3, 3),
        ("smollm2-135m", 2, 1, 4, 3),
        ("smollm2-135m", 3, 1, 3, 3),
        ("smollm2-135m", 4, 1, 4, 3),
        ("smollm2-135m", 8, 2, 8, 2),
        ("gemma-3-270m", 2, 2, 2, 2),
        ("gemma-3-270m", 4, 4, 4, 1),
        ("llama-3.3-70b", 8, 1, 8, 8),
        ("llama-3.3-70b", 16, 2, 16, 4),
    ],
)
def test_the_layout_with_the_fewest_bytes_is_chosen(
    name: str, tensor: int, copies: int, groups: int, group: int
) -> None:
    layout = choose_layout(preset(name), tensor)
    assert (layout.copies, layout.groups, layout.group) == (copies, groups, group)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 6, 8])
def test_every_split_axis_divides(name: str, tensor: int) -> None:
    here = choose_layout(preset(name), tensor).stretched
    for size in (here.kv_heads, here.q_heads, here.ffn, here.vocab_size):
        assert size % tensor == 0


def test_a_layout_names_what_it_adds() -> None:
    assert choose_layout(preset("smollm2-135m"), 3).notes() == []
    assert choose_layout(preset("smollm2-135m"), 4).notes() == [
        "q_heads: 9 padded to 12 in 4 groups of 3"
    ]
    assert choose_layout(preset("gemma-3-270m"), 3).notes() == [
        "kv_heads: 1 copied 2 times, query heads dealt out",
        "q_heads: 4 padded to 6 in 3 groups of 2",
        "ffn: 2048 padded to 2049 (+0.0%)",
        "vocab: 262144 padded to 262146 (+0.0%)",
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.tensor}-{layout.copies}")
def test_stretching_keeps_every_number_and_adds_zeros_and_copies_of_keys_and_values(
    layout: Layout,
) -> None:
    for axes, shape in SHAPES.items():
        array = numbered(shape)
        stretched = np.asarray(layout.stretch(jnp.asarray(array), axes))
        np.testing.assert_array_equal(shrink(layout, stretched, axes), array)
        assert layout.true_shape(stretched.shape, axes) == array.shape
        values, counts = np.unique(stretched[stretched > 0], return_counts=True)
        np.testing.assert_array_equal(values, array.ravel())
        if "kv_heads" not in axes:
            assert counts.max() == 1


def test_a_query_head_stays_with_its_key() -> None:
    """The heads of w_o in their order are those of the query rows of w_qkv."""
    for layout in LAYOUTS:
        true_head = np.arange(1, 10, dtype=np.float32)
        columns = np.asarray(layout.stretch(jnp.asarray(true_head), ("q_heads",)))
        rows = np.zeros((3, 5), np.float32)
        rows[:, :3] = true_head.reshape(3, 3)
        rows[:, 3] = [1, 2, 3]
        stretched = np.asarray(layout.stretch(jnp.asarray(rows), ("kv_heads", "group")))
        np.testing.assert_array_equal(stretched[:, : layout.group].ravel(), columns)
        for group in stretched:
            for head in group[: layout.group]:
                assert head == 0 or (head - 1) // 3 + 1 == group[layout.group]


@given(data=st.data())
def test_boxes_read_what_stretching_gives(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    axes = data.draw(st.sampled_from(list(SHAPES)))
    array = numbered(SHAPES[axes])
    stretched = np.asarray(layout.stretch(jnp.asarray(array), axes))
    box = []
    for size in stretched.shape:
        start = data.draw(st.integers(0, size - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, size))))
    out = np.zeros([part.stop - part.start for part in box], np.float32)
    for into, true in layout.boxes(axes, tuple(box)):
        assert not out[into].any(), "a place is written twice"
        out[into] = array[true]
    np.testing.assert_array_equal(out, stretched[tuple(box)])


def test_boxes_are_few() -> None:
    """One read for each group and part at most: a checkpoint is not read number by number."""
    layout = choose_layout(ODD, 4)
    shape = layout.stretch(
        jnp.zeros(SHAPES["embed", "q_heads", "head_dim"]), ("embed", "q_heads", "head_dim")
    ).shape
    box = tuple(slice(0, size) for size in shape)
    assert len(list(layout.boxes(("embed", "q_heads", "head_dim"), box))) == 1
    for axes, shape in itertools.islice(SHAPES.items(), 1):
        stretched = layout.stretch(jnp.zeros(shape), axes).shape
        assert len(list(layout.boxes(axes, tuple(slice(0, n) for n in stretched)))) == 3
