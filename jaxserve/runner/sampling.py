"""Every sampling parameter over a batch of logits, on the device, as data.

Order: repetition, presence and frequency penalties; bias (logit bias, allowed and banned tokens);
suppressed end tokens; a grammar's mask; temperature; min_p; top_k; top_p. Then the argmax of what
is left plus Gumbel noise whose key is the request's seed, the choice and the token's position, so
that a row's token does not depend on its neighbours.

The vocabulary may be split over the mesh (``vocab.py``): then every shard finds the best of its own
tokens, and one exchange of a few numbers per row decides between them.

Optional work stands behind ``lax.cond`` on "does any row want it": the program is the same for
every mix of requests. A batch that wants no more than each row's best token asks for no more, and
the head need not write its logits down.
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
from jaxserve.models.decoder import Logits
from jaxserve.runner.vocab import VocabShard
from pallas_kernels.quantized_matmul import largest


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
    def samples(self) -> Bool[Array, " B"]:
        """Which rows get a token: padding and all but the last chunk of a prompt do not."""
        return self.column(Column.SAMPLES) > 0

    @property
    def has_noise(self) -> Bool[Array, " B"]:
        """Which rows draw their token; the others take the best."""
        return self.floats(Column.TEMPERATURE_BITS) > 0

    @property
    def uses_counts(self) -> Bool[Array, " B"]:
        """Which rows have penalties."""
        return self.column(Column.USES_COUNTS) > 0

    @property
    def uses_bias(self) -> Bool[Array, " B"]:
        """Which rows have a bias."""
        return self.column(Column.USES_BIAS) > 0

    @property
    def uses_mask(self) -> Bool[Array, " B"]:
        """Which rows obey a grammar."""
        return self.column(Column.USES_MASK) > 0

    @property
    def suppresses_stop(self) -> Bool[Array, " B"]:
        """Which rows may not choose a token of ``suppressed`` yet."""
        return self.column(Column.SUPPRESS_STOP) > 0

    @property
    def suppressed(self) -> Int[Array, "B E"]:
        """End and stop tokens of each row, padded with -1."""
        return self.packed[:, int(Column.SUPPRESSED) : int(Column.SUPPRESSED) + MAX_SUPPRESSED]

    @property
    def table(self) -> Int[Array, "B W"]:
        """Page table of each row."""
        return self.packed[:, COLUMNS:]


def choose(
    logits: Logits,
    lines: Lines,
    counts: Int[Array, "R V"],
    bias: Float[Array, "R V"],
    masks: Int[Array, "R M"],
    vocab: VocabShard,
) -> Int[Array, "B C"]:
    """Chooses one token per row.

    Args:
        logits: of the model, for this shard's part of the vocabulary. When no row that samples
            wants more than its best token, no other logit is asked for.
        lines: the rows' parameters; ``lines.table`` may be empty.
        counts: ``DeviceState.counts``, this shard's part.
        bias: ``DeviceState.bias``, this shard's part.
        masks: ``DeviceState.masks``, of the whole vocabulary.
        vocab: which part it is.

    Returns:
        Result lines (``engine.step.RESULT_COLUMNS``): token, log-probability bits, rank,
        alternatives. Log-probabilities are zero where they were not asked for. Lines that do not
        sample hold nothing of use.
    """
    # What other lines say does not count: padding asks for log-probabilities, by its zeros.
    adjusts = lines.samples & (
        lines.uses_counts | lines.uses_bias | lines.suppresses_stop | lines.uses_mask
    )
    has_noise = lines.samples & lines.has_noise
    wants_logprobs = lines.samples & (lines.column(Column.LOGPROBS) >= 0)
    wants_more = adjusts | has_noise | wants_logprobs
    no_details = jnp.zeros((lines.packed.shape[0], 2 + 2 * MAX_LOGPROBS), jnp.int32)

    def greedy() -> Int[Array, "B C"]:
        best = logits.best(vocab.tokens(logits.size))
        token = _decide(best.answer, vocab.ids(logits.size)[best.place], best.is_finite, vocab)
        return jnp.concatenate([token[:, None], no_details], axis=1)

    def anything() -> Int[Array, "B C"]:
        every, healthy = _tokens_alone(logits.every(), vocab)
        adjusted = lax.cond(
            jnp.any(adjusts),
            lambda: _adjust(every, lines, counts, bias, masks, vocab),
            lambda: every,
        )
        # The branches return two numbers a row: handing on the scores would copy them all.
        best, own = lax.cond(
            jnp.any(has_noise),
            lambda: _best(
                jnp.where(has_noise[:, None], _noisy(adjusted, lines, vocab), adjusted),
                vocab,
            ),
            lambda: _best(adjusted, vocab),
        )
        token = _decide(best, own, healthy, vocab)
        details = lax.cond(
            jnp.any(wants_logprobs),
            lambda: logprob_columns(every, token, vocab),
            lambda: no_details,
        )
        return jnp.concatenate([token[:, None], details], axis=1)

    return lax.cond(jnp.any(wants_more), anything, greedy)


def _tokens_alone(
    logits: Float[Array, "B V"], vocab: VocabShard
) -> tuple[Float[Array, "B V"], Bool[Array, " B"]]:
    """The logits with padding at minus infinity, and whether all the others are finite."""
    # As a maximum: XLA's CPU backend adds one number after the other.
    spoilt = jnp.where(jnp.isfinite(logits), 0.0, 1.0)
    is_token = vocab.is_token(logits.shape[-1])
    if is_token is not None:
        spoilt = jnp.where(is_token[None], spoilt, 0.0)
        logits = jnp.where(is_token[None], logits, -jnp.inf)
    return logits, jnp.max(spoilt, axis=-1) == 0.0


def _best(
    scores: Float[Array, "B V"], vocab: VocabShard
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """The highest score of this shard's tokens, and whose it is; of equals the lowest id."""
    best, place = largest(scores)
    return best, vocab.ids(scores.shape[-1])[place]


def _decide(
    best: Float[Array, " B"],
    token: Int[Array, " B"],
    healthy: Bool[Array, " B"],
    vocab: VocabShard,
) -> Int[Array, " B"]:
    """The best of all shards' best tokens, or what is wrong with the row."""
    candidates = vocab.gather(jnp.stack([bits(best), token, healthy.astype(jnp.int32)], axis=-1))
    best = lax.bitcast_convert_type(candidates[:, :, 0], jnp.float32)
    winner = jnp.argmax(best, axis=1)[:, None]
    token = jnp.take_along_axis(candidates[:, :, 1], winner, axis=1)[:, 0]
    token = jnp.where(jnp.max(best, axis=1) == -jnp.inf, NO_TOKEN_LEFT, token)
    return jnp.where(jnp.all(candidates[:, :, 2] > 0, axis=1), token, POISONED_TOKEN)


def logprob_columns(
    logits: Float[Array, "B V"], token: Int[Array, " B"], vocab: VocabShard
) -> Int[Array, "B C"]:
    """Log-probability bits and rank of ``token``, then the likeliest tokens and theirs."""
    normaliser = vocab.logsumexp(logits)[:, None]
    own = vocab.pick(logits, token)[:, None]
    rank = 1 + vocab.sum(jnp.sum(logits > own, axis=-1, dtype=jnp.int32))
    top, places = lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    top, ids = merge_top(top, vocab.ids(logits.shape[-1])[places], vocab)
    return jnp.concatenate(
        [bits(own - normaliser), rank[:, None], ids, bits(top - normaliser)], axis=1
    )


def merge_top(
    top: Float[Array, "B C"], ids: Int[Array, "B C"], vocab: VocabShard
) -> tuple[Float[Array, "B M"], Int[Array, "B M"]]:
    """The ``MAX_LOGPROBS`` likeliest of every shard's likeliest; padded when there are fewer."""
    candidates = vocab.gather(jnp.concatenate([bits(top), ids], axis=1))
    shards, width = candidates.shape[1], top.shape[1]
    values = lax.bitcast_convert_type(candidates[:, :, :width], jnp.float32)
    values = values.reshape(-1, shards * width)
    best, order = lax.top_k(values, min(MAX_LOGPROBS, values.shape[1]))
    ids = jnp.take_along_axis(candidates[:, :, width:].reshape(values.shape), order, axis=1)
    pad = ((0, 0), (0, MAX_LOGPROBS - best.shape[1]))
    return jnp.pad(best, pad), jnp.pad(ids, pad)


def bits(values: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """The bit patterns of float32 values as int32."""
    return lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


def _adjust(
    logits: Float[Array, "B V"],
    lines: Lines,
    counts: Int[Array, "R V"],
    bias: Float[Array, "R V"],
    masks: Int[Array, "R M"],
    vocab: VocabShard,
) -> Float[Array, "B V"]:
    """Penalties, bias, suppressed end tokens and masks, where any row uses them."""
    row = lines.column(Column.ROW)
    uses_counts, uses_bias, suppresses, uses_mask = (
        uses[:, None]
        for uses in (lines.uses_counts, lines.uses_bias, lines.suppresses_stop, lines.uses_mask)
    )
    logits = lax.cond(
        jnp.any(uses_counts),
        lambda: jnp.where(uses_counts, _penalise(logits, lines, counts[row]), logits),
        lambda: logits,
    )
    logits = lax.cond(
        jnp.any(uses_bias),
        lambda: logits + jnp.where(uses_bias, bias[row], 0.0),
        lambda: logits,
    )
    logits = lax.cond(
        jnp.any(suppresses),
        lambda: _suppress(logits, jnp.where(suppresses, lines.suppressed, -1), vocab),
        lambda: logits,
    )
    return lax.cond(
        jnp.any(uses_mask),
        lambda: jnp.where(~uses_mask | vocab.bits(masks[row], logits.shape[-1]), logits, -jnp.inf),
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


def _suppress(
    logits: Float[Array, "B V"], tokens: Int[Array, "B E"], vocab: VocabShard
) -> Float[Array, "B V"]:
    batch, size = logits.shape
    # Padding (-1) and other shards' tokens go to a place past the end, which the scatter drops.
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return logits.at[rows, vocab.local(tokens, size)].set(-jnp.inf, mode="drop")


def _noisy(logits: Float[Array, "B V"], lines: Lines, vocab: VocabShard) -> Float[Array, "B V"]:
    """The Gumbel-max trick: the argmax of logits plus noise is a draw from their softmax.

    Rounding in the logits changes a draw only where two candidates tie to within it. Inverting the
    cumulative distribution would add the rounding of all tokens before a boundary instead.
    """
    temperature = lines.floats(Column.TEMPERATURE_BITS)
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    top_k, top_p = lines.column(Column.TOP_K), lines.floats(Column.TOP_P_BITS)
    min_p = lines.floats(Column.MIN_P_BITS)
    filters = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    scaled = lax.cond(
        jnp.any(filters & (temperature > 0)),
        lambda: jnp.where(_kept(scaled, top_k, top_p, min_p, vocab), scaled, -jnp.inf),
        lambda: scaled,
    )
    return scaled + _gumbel(lines, vocab.ids(scaled.shape[-1]))


def _kept(
    scaled: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    vocab: VocabShard,
) -> Bool[Array, "B V"]:
    """Which tokens min_p, then top_k, then top_p leave. Ties with the last kept token stay."""
    mass = jnp.exp(scaled - vocab.max(jnp.max(scaled, axis=-1))[:, None])
    kept = mass >= min_p[:, None]
    order = jnp.where(kept, _sortable(scaled), jnp.uint32(0))
    k = jnp.where(top_k > 0, top_k, vocab.total).astype(jnp.float32)
    ones = kept.astype(jnp.float32)
    wanted = jnp.minimum(k, vocab.sum(jnp.sum(ones, axis=-1)))
    kept &= order >= _threshold(order, ones, wanted, vocab)[:, None]
    left = jnp.where(kept, mass, 0.0)
    wanted = top_p * vocab.sum(jnp.sum(left, axis=-1))
    threshold = lax.cond(
        jnp.any(top_p < 1.0),
        lambda: _threshold(order, left, wanted, vocab),
        lambda: jnp.zeros(scaled.shape[0], jnp.uint32),
    )
    return kept & ((order >= threshold[:, None]) | (top_p >= 1.0)[:, None])


def _sortable(values: Float[Array, "B V"]) -> Array:
    """uint32 keys in the order of the float32 values; 0 is below every finite one."""
    raw = lax.bitcast_convert_type(values, jnp.uint32)
    negative = raw >> 31 == 1
    return jnp.where(negative, ~raw, raw | jnp.uint32(1 << 31))


def _threshold(
    order: Array, weight: Float[Array, "B V"], wanted: Float[Array, " B"], vocab: VocabShard
) -> Array:
    """The largest key t, uint32 [B], for which tokens with key >= t weigh at least ``wanted``.

    Built bit by bit from the top: 32 reductions instead of a sort, and exact.
    """

    def try_bit(index: Int[Array, ""], found: Array) -> Array:
        bit = jnp.uint32(1) << (jnp.uint32(31) - index.astype(jnp.uint32))
        candidate = found | bit
        weighs = vocab.sum(jnp.sum(jnp.where(order >= candidate[:, None], weight, 0.0), axis=-1))
        return jnp.where(weighs >= wanted, candidate, found)

    start = jnp.zeros(order.shape[0], jnp.uint32)
    return lax.fori_loop(jnp.int32(0), jnp.int32(32), try_bit, start)


def _gumbel(lines: Lines, ids: Int[Array, " V"]) -> Float[Array, "B V"]:
    """Gumbel noise of every token, from (seed, choice, position of the new token, token).

    Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") makes two
    words per row; two rounds of MurmurHash3's finalizer spread them over the vocabulary at a tenth
    of what Threefry would cost there. A token's noise does not depend on which device holds it.
    """
    seed = [_unsigned(lines.column(column)) for column in (Column.SEED_HIGH, Column.SEED_LOW)]
    position = _unsigned(lines.column(Column.START) + lines.column(Column.LENGTH))
    choice = _unsigned(lines.column(Column.CHOICE))

    def draw(key: Array, counter: Array) -> Array:
        return threefry_2x32((key[0], key[1]), counter)

    words = jax.vmap(draw)(jnp.stack(seed, axis=-1), jnp.stack([choice, position], axis=-1))
    token = ids.astype(jnp.uint32)[None] * jnp.uint32(0x9E3779B1)
    noise = _finalize(_finalize(token ^ words[:, :1]) + words[:, 1:])
    # All 32 bits count near zero, where the exponential variables lie that win.
    uniform = (noise.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    return -jnp.log(-jnp.log1p(-uniform))


def _finalize(words: Array) -> Array:
    """MurmurHash3's 32-bit finalizer: every bit of a word reaches every other."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _unsigned(values: Int[Array, " B"]) -> Array:
    return lax.bitcast_convert_type(values, jnp.uint32)
