"""Every sampling parameter over a batch of logits, on the device, as data.

Order: repetition, presence and frequency penalties; bias (logit bias, allowed and banned tokens);
suppressed end tokens; temperature; min_p; top_k; top_p. Then the inverse of the cumulative
distribution at one uniform number per row, whose key is the request's seed folded with the choice
and the token's position, so that a row's token does not depend on its neighbours.

Optional work stands behind ``lax.cond`` on "does any row want it": the program is the same for
every mix of requests, and greedy batches do not pay for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float, Int

from jaxserve.engine.request import MAX_LOGPROBS
from jaxserve.engine.step import (
    COLUMNS,
    MAX_SUPPRESSED,
    NO_TOKEN_LEFT,
    POISONED_TOKEN,
    SEEN_IN_PROMPT,
    Column,
)

GROUP = 128  # Tokens per group of the two-level inverse: a short scan over groups, then in one.


@dataclass(frozen=True)
class Lines:
    """Named views of packed lines (see ``engine/step.py``)."""

    packed: Int[Array, "B C"]

    def column(self, column: Column) -> Int[Array, " B"]:
        """One int32 column."""
        return self.packed[:, int(column)]

    def floats(self, column: Column) -> Float[Array, " B"]:
        """One float32 column, from its bits."""
        return lax.bitcast_convert_type(self.column(column), jnp.float32)

    @property
    def suppressed(self) -> Int[Array, "B E"]:
        """End and stop tokens of each row, padded with -1."""
        return self.packed[:, int(Column.SUPPRESSED) : int(Column.SUPPRESSED) + MAX_SUPPRESSED]

    @property
    def table(self) -> Int[Array, "B W"]:
        """Page table of each row."""
        return self.packed[:, COLUMNS:]


def choose(
    logits: Float[Array, "B V"],
    lines: Lines,
    counts: Int[Array, "R V"],
    bias: Float[Array, "R V"],
) -> Int[Array, "B C"]:
    """Chooses one token per row.

    Args:
        logits: float32, of the model.
        lines: the rows' parameters; ``lines.table`` may be empty.
        counts: ``DeviceState.counts``.
        bias: ``DeviceState.bias``.

    Returns:
        Result lines (``engine.step.RESULT_COLUMNS``): token, log-probability bits, rank,
        alternatives. Log-probabilities are zero where they were not asked for.
    """
    temperature = lines.floats(Column.TEMPERATURE_BITS)
    adjusted = _adjust(logits, lines, counts, bias)
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    token = lax.cond(
        jnp.any(temperature > 0),
        lambda: jnp.where(temperature > 0, _sample(adjusted, lines), greedy),
        lambda: greedy,
    )
    details = lax.cond(
        jnp.any(lines.column(Column.LOGPROBS) >= 0),
        lambda: logprob_columns(logits, token),
        lambda: jnp.zeros((token.shape[0], 2 + 2 * MAX_LOGPROBS), jnp.int32),
    )
    # One NaN or infinity poisons the sum of a row; finite logits cannot overflow it, because
    # they are scaled down by far more than the vocabulary first.
    healthy = jnp.isfinite(jnp.sum(logits * jnp.float32(2.0**-40), axis=-1))
    token = jnp.where(jnp.max(adjusted, axis=-1) == -jnp.inf, NO_TOKEN_LEFT, token)
    token = jnp.where(healthy, token, POISONED_TOKEN)
    return jnp.concatenate([token[:, None], details], axis=1)


def logprob_columns(logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Int[Array, "B C"]:
    """Log-probability bits and rank of ``token``, then the likeliest tokens and theirs."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, token[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32)
    top, ids = lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    pad = ((0, 0), (0, MAX_LOGPROBS - top.shape[-1]))
    return jnp.concatenate(
        [
            bits(own - normaliser[:, None]),
            rank[:, None],
            jnp.pad(ids.astype(jnp.int32), pad),
            jnp.pad(bits(top - normaliser[:, None]), pad),
        ],
        axis=1,
    )


def bits(values: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """The bit patterns of float32 values as int32."""
    return lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


def _adjust(
    logits: Float[Array, "B V"],
    lines: Lines,
    counts: Int[Array, "R V"],
    bias: Float[Array, "R V"],
) -> Float[Array, "B V"]:
    """Penalties, bias and suppressed end tokens, where any row uses them."""
    row = lines.column(Column.ROW)
    uses_counts = lines.column(Column.USES_COUNTS) > 0
    uses_bias = lines.column(Column.USES_BIAS) > 0
    suppress = lines.column(Column.SUPPRESS_STOP) > 0
    logits = lax.cond(
        jnp.any(uses_counts),
        lambda: jnp.where(uses_counts[:, None], _penalise(logits, lines, counts[row]), logits),
        lambda: logits,
    )
    logits = lax.cond(
        jnp.any(uses_bias),
        lambda: logits + jnp.where(uses_bias[:, None], bias[row], 0.0),
        lambda: logits,
    )
    return lax.cond(
        jnp.any(suppress),
        lambda: _suppress(logits, jnp.where(suppress[:, None], lines.suppressed, -1)),
        lambda: logits,
    )


def _penalise(
    logits: Float[Array, "B V"], lines: Lines, counts: Int[Array, "B V"]
) -> Float[Array, "B V"]:
    output = counts & (SEEN_IN_PROMPT - 1)
    repetition = lines.floats(Column.REPETITION_BITS)[:, None]
    # Keskar et al. 2019: towards less likely, whichever sign the logit has.
    penalised = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, penalised, logits)
    frequency = lines.floats(Column.FREQUENCY_BITS)[:, None] * output.astype(jnp.float32)
    presence = lines.floats(Column.PRESENCE_BITS)[:, None] * (output > 0).astype(jnp.float32)
    return logits - frequency - presence


def _suppress(logits: Float[Array, "B V"], tokens: Int[Array, "B E"]) -> Float[Array, "B V"]:
    batch, vocab = logits.shape
    # Padding (-1) goes to an index past the end, which the scatter drops.
    index = jnp.where(tokens < 0, vocab, tokens)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return logits.at[rows, index].set(-jnp.inf, mode="drop")


def _sample(logits: Float[Array, "B V"], lines: Lines) -> Int[Array, " B"]:
    temperature = lines.floats(Column.TEMPERATURE_BITS)
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    top_k, top_p = lines.column(Column.TOP_K), lines.floats(Column.TOP_P_BITS)
    min_p = lines.floats(Column.MIN_P_BITS)
    filters = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    mass = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    mass = lax.cond(
        jnp.any(filters & (temperature > 0)),
        lambda: jnp.where(_kept(scaled, mass, top_k, top_p, min_p), mass, 0.0),
        lambda: mass,
    )
    return _invert(mass, _uniform(lines))


def _kept(
    scaled: Float[Array, "B V"],
    mass: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Bool[Array, "B V"]:
    """Which tokens min_p, then top_k, then top_p leave. Ties with the last kept token stay."""
    kept = mass >= min_p[:, None]
    order = jnp.where(kept, _sortable(scaled), jnp.uint32(0))
    k = jnp.where(top_k > 0, top_k, scaled.shape[-1]).astype(jnp.float32)
    ones = kept.astype(jnp.float32)
    kept &= order >= _threshold(order, ones, jnp.minimum(k, jnp.sum(ones, axis=-1)))[:, None]
    left = jnp.where(kept, mass, 0.0)
    wanted = top_p * jnp.sum(left, axis=-1)
    threshold = lax.cond(
        jnp.any(top_p < 1.0),
        lambda: _threshold(order, left, wanted),
        lambda: jnp.zeros(scaled.shape[0], jnp.uint32),
    )
    return kept & ((order >= threshold[:, None]) | (top_p >= 1.0)[:, None])


def _sortable(values: Float[Array, "B V"]) -> Array:
    """uint32 keys in the order of the float32 values; 0 is below every finite one."""
    raw = lax.bitcast_convert_type(values, jnp.uint32)
    negative = raw >> 31 == 1
    return jnp.where(negative, ~raw, raw | jnp.uint32(1 << 31))


def _threshold(order: Array, weight: Float[Array, "B V"], wanted: Float[Array, " B"]) -> Array:
    """The largest key t, uint32 [B], for which tokens with key >= t weigh at least ``wanted``.

    Built bit by bit from the top: 32 reductions instead of a sort, and exact.
    """

    def try_bit(index: Int[Array, ""], found: Array) -> Array:
        bit = jnp.uint32(1) << (jnp.uint32(31) - index.astype(jnp.uint32))
        candidate = found | bit
        weighs = jnp.sum(jnp.where(order >= candidate[:, None], weight, 0.0), axis=-1)
        return jnp.where(weighs >= wanted, candidate, found)

    start = jnp.zeros(order.shape[0], jnp.uint32)
    return lax.fori_loop(jnp.int32(0), jnp.int32(32), try_bit, start)


def _uniform(lines: Lines) -> Float[Array, " B"]:
    """One number in [0, 1) per row: Threefry-2x32 of (choice, position) under the seed as key.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The position is the new
    token's. A counter-based generator needs one block per row and keeps no state.
    """
    seed = [_unsigned(lines.column(column)) for column in (Column.SEED_HIGH, Column.SEED_LOW)]
    position = _unsigned(lines.column(Column.START) + lines.column(Column.LENGTH))
    choice = _unsigned(lines.column(Column.CHOICE))

    def draw(key: Array, counter: Array) -> Array:
        return threefry_2x32((key[0], key[1]), counter)[0]

    words = jax.vmap(draw)(jnp.stack(seed, axis=-1), jnp.stack([choice, position], axis=-1))
    return (words >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _unsigned(values: Int[Array, " B"]) -> Array:
    return lax.bitcast_convert_type(values, jnp.uint32)


def _invert(mass: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """The token at which the cumulative mass passes ``uniform`` of the total.

    Never a token without mass: rounding at a boundary falls to the last token that has some.
    """
    batch, vocab = mass.shape
    grouped = jnp.pad(mass, ((0, 0), (0, -vocab % GROUP))).reshape(batch, -1, GROUP)
    sums = jnp.sum(grouped, axis=-1)
    target = uniform * jnp.sum(sums, axis=-1)
    group, before = _first_above(sums, target)
    chosen = jnp.take_along_axis(grouped, group[:, None, None], axis=1)[:, 0]
    token, _ = _first_above(chosen, target - before)
    return (group * GROUP + token).astype(jnp.int32)


def _first_above(
    mass: Float[Array, "B X"], target: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """First place with mass whose running sum exceeds ``target``, and the sum before it."""
    running = jnp.cumsum(mass, axis=-1)
    some = mass > 0
    above = (running > target[:, None]) & some
    last = mass.shape[-1] - 1 - jnp.argmax(some[:, ::-1], axis=-1)
    place = jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), last)
    index = place[:, None]
    before = jnp.take_along_axis(running, index, axis=-1) - jnp.take_along_axis(
        mass, index, axis=-1
    )
    return place.astype(jnp.int32), before[:, 0]
