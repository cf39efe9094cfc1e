"""Each function against a few lines of numpy or a value that can be worked out by hand."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from jaxserve.models.config import RopeScaling
from jaxserve.models.layers import (
    project,
    rms_norm,
    rope_frequencies,
    rope_table,
    softcap,
)
from pallas_kernels.paged_attention import apply_rope


def test_rms_norm_divides_by_the_root_mean_square():
    x = jnp.array([[3.0, 4.0]])
    out = rms_norm(x, jnp.array([1.0, 10.0]), eps=0.0, offset=False)
    np.testing.assert_allclose(out, [[3 / math.sqrt(12.5), 40 / math.sqrt(12.5)]], rtol=1e-6)


def test_rms_norm_with_offset_adds_one_to_the_weight():
    x = jnp.array([[3.0, 4.0], [1.0, -2.0]])
    weight = jnp.array([0.25, -0.5])
    np.testing.assert_array_equal(
        rms_norm(x, weight, eps=1e-6, offset=True), rms_norm(x, weight + 1, eps=1e-6, offset=False)
    )


def test_eps_keeps_the_norm_of_zeros_finite():
    out = rms_norm(jnp.zeros((1, 4)), jnp.ones(4), eps=1e-6, offset=False)
    np.testing.assert_array_equal(out, np.zeros((1, 4)))


def test_rms_norm_computes_in_float32_whatever_comes_in():
    """Squares of 300 overflow float16."""
    out = rms_norm(jnp.full((1, 8), 300.0, jnp.float16), jnp.ones(8), eps=0.0, offset=False)
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out, np.ones((1, 8)))


def test_project_contracts_the_last_axes_of_any_leading_shape():
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_allclose(project(jnp.array(x), jnp.array(w)), x @ w.T, rtol=1e-5, atol=1e-5)


def test_project_accumulates_in_float32():
    """In bfloat16 a running sum of ones stays at 256."""
    ones = jnp.ones((1, 1000), jnp.bfloat16)
    assert project(ones, ones, dtype=jnp.dtype(jnp.float32))[0, 0] == 1000.0
    assert project(ones, ones).dtype == jnp.bfloat16


def test_rope_multiplies_complex_numbers():
    """Pair j is the complex number x[j] + i x[j + H/2], turned by position * theta^(-2j/H)."""
    heads = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 7, 100, 511]])
    table = rope_table(jnp.array(positions), rope_frequencies(8, 1e4, None))

    out = np.asarray(apply_rope(jnp.array(heads), table))

    turn = np.exp(1j * positions[0][:, None] * 1e4 ** (-np.arange(4) / 4))[None, :, None]
    turned = (heads[..., :4] + 1j * heads[..., 4:]) * turn
    np.testing.assert_allclose(
        out, np.concatenate([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-5
    )


def test_position_zero_is_not_rotated():
    heads = jnp.arange(16.0).reshape(1, 1, 1, 16)
    table = rope_table(jnp.zeros((1, 1), jnp.int32), rope_frequencies(16, 1e4, None))
    np.testing.assert_array_equal(apply_rope(heads, table), heads)


def test_neighbouring_positions_differ_far_into_the_context_in_bfloat16():
    """The table stays in float32: as bfloat16 numbers, 30000 and 30001 are the same position."""
    heads = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    table = rope_table(jnp.array([[30000, 30001]]), rope_frequencies(8, 1e4, None))
    near, far = apply_rope(heads, table)[0]
    assert table.dtype == jnp.float32
    assert np.abs(np.asarray(near - far, np.float32)).max() > 0.1


def test_angles_far_out_are_as_good_as_float32_allows():
    frequencies = rope_frequencies(128, 5e5, None)
    cos, _ = np.asarray(rope_table(jnp.array([[131071]]), frequencies))
    exact = np.cos(131071 * frequencies.astype(np.float64))
    assert np.abs(cos[0, 0] - exact).max() < 131071 * 2**-24


def test_linear_scaling_stretches_every_frequency():
    scaling = RopeScaling(kind="linear", factor=8.0)
    np.testing.assert_allclose(
        rope_frequencies(64, 1e6, scaling), rope_frequencies(64, 1e6, None) / 8, rtol=1e-6
    )


def test_llama3_scaling_keeps_fast_pairs_and_slows_slow_ones():
    """By hand, case by case, as the release's own code has it."""
    scaling = RopeScaling(kind="llama3", factor=32.0)
    plain = rope_frequencies(64, 5e5, None).astype(np.float64)

    expected = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 32)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 32 + smooth * frequency)

    scaled = rope_frequencies(64, 5e5, scaling)
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)
    assert scaled[0] == plain[0].astype(np.float32)
    assert any(f / 32 < s < f for f, s in zip(plain, scaled, strict=True))


def test_softcap_bends_large_values_and_zero_turns_it_off():
    x = jnp.array([-1000.0, 0.0, 0.1, 1000.0])
    np.testing.assert_allclose(softcap(x, 30.0), [-30, 0, 0.1, 30], atol=1e-5)
    np.testing.assert_array_equal(softcap(x, 0.0), x)
