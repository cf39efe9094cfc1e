"""The pure functions that get compiled: one decode, one prefill and one scoring step.

Each takes (params, state, result, packed) and gives (state, result[, scores, hidden]). ``state`` is
donated. ``result`` holds the newest sample of every row; the calls of one step hand it on, so
that the host reads one array however many programs a step ran. Everything is written for the
local shard: the runner wraps these in one ``shard_map``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.engine.request import MAX_LOGPROBS
from jaxserve.engine.step import COLUMNS, RESULT_COLUMNS, Column
from jaxserve.models.decoder import Model, Params
from jaxserve.runner.cache import DeviceState
from jaxserve.runner.sampling import Lines, bits, choose, merge_top
from jaxserve.runner.vocab import VocabShard
from pallas_kernels.paged_attention import Pools, paged_attention, places_of, rope_append
from pallas_kernels.quantized_matmul import Matrix, Products, Quantized

SCORE_VOCAB_CHUNK = 8192  # Vocabulary scored at once: T x 8192 float32 instead of T x V.
ChunkLogits = Callable[[Array], tuple[Array, Array]]
"""From the start of a chunk to its logits ``[T, X]`` and their token ids ``[X]``."""


@dataclass(frozen=True)
class StepPrograms:
    """The step functions of one model. Holds no array."""

    model: Model
    table_width: int
    tensor_axis: str | None
    """Mesh axis that heads, ffn and vocabulary are split over; None: one device has all."""
    has_native: bool = True
    """Kernels of this machine may be called; not when another device's programs are traced here."""

    activations: jnp.dtype | None = None
    """What goes from layer to layer; None: the weights' dtype."""

    narrow: bool = False
    """Products may round on the way where that is faster; see ``quantized_matmul``."""

    @property
    def products(self) -> Products:
        """How to multiply by the weights."""
        return Products("auto" if self.has_native else "xla", self.narrow)

    @property
    def vocab(self) -> VocabShard:
        """This shard's part of the vocabulary."""
        return VocabShard(self.model.layout.config.vocab_size, self.tensor_axis)

    def decode(
        self,
        params: Params,
        state: DeviceState,
        result: Int[Array, "R C"],
        packed: Int[Array, "B X"],
    ) -> tuple[DeviceState, Int[Array, "R C"]]:
        """One token for every line: the row's newest token goes in, the next comes out."""
        lines = Lines(packed)
        tokens = state.last_token[lines.column(Column.ROW)][:, None]
        hidden, state = self._forward(params, state, lines, tokens)
        return self._sample(params, state, result, lines, hidden[:, 0])

    def prefill(
        self,
        params: Params,
        state: DeviceState,
        result: Int[Array, "R C"],
        packed: Int[Array, "B X"],
        *,
        tokens: int,
    ) -> tuple[DeviceState, Int[Array, "R C"]]:
        """So many prompt tokens of all lines; the last token of a prompt is sampled from."""
        hidden, state, lines = self._prompt(params, state, packed, tokens)
        return self._sample(params, state, result, lines, _last(hidden, lines))

    def score(
        self,
        params: Params,
        state: DeviceState,
        result: Int[Array, "R C"],
        packed: Int[Array, "B X"],
        *,
        tokens: int,
    ) -> tuple[DeviceState, Int[Array, "R C"], Int[Array, "T C"], Float[Array, "T D"]]:
        """``prefill`` for one line that also scores the token after each place.

        What the head saw comes along, for ``divergence``: serving leaves it on the device.
        """
        hidden, state, lines = self._prompt(params, state, packed, tokens)
        targets = packed[0, COLUMNS + self.table_width + 1 :]
        with jax.named_scope("score"):
            scores = self._score(params, hidden, targets)
        state, result = self._sample(params, state, result, lines, _last(hidden, lines))
        return state, result, scores, hidden

    def embed(
        self,
        params: Params,
        state: DeviceState,
        result: Int[Array, "R C"],
        packed: Int[Array, "B X"],
        *,
        tokens: int,
    ) -> tuple[DeviceState, Int[Array, "R C"], Float[Array, "B D"]]:
        """``prefill`` that samples nothing, and gives back what the head would see of each line.

        That is the last token's hidden state behind the final norm, in float32.
        """
        hidden, state, lines = self._prompt(params, state, packed, tokens)
        return state, result, _last(hidden, lines).astype(jnp.float32)

    def set_row(
        self,
        state: DeviceState,
        row: Int[Array, " 1"],
        counts: Int[Array, " V"],
        bias: Float[Array, " V"],
    ) -> DeviceState:
        """Replaces the dense state of one row of each data shard (of its null row, for most)."""
        return replace(
            state,
            counts=state.counts.at[row[0]].set(counts),
            bias=state.bias.at[row[0]].set(bias),
        )

    def set_masks(
        self, state: DeviceState, rows: Int[Array, " B"], words: Int[Array, "B M"]
    ) -> DeviceState:
        """Replaces the masks of some rows of each data shard; those left over name its null row."""
        return replace(state, masks=state.masks.at[rows].set(words))

    def chunked_logits(
        self, head: Matrix, hidden: Float[Array, "T D"]
    ) -> tuple[Int[Array, " N"], ChunkLogits]:
        """Returns where chunks of this shard's vocabulary start, and what computes one of them.

        That gives float32 logits, and the token ids that they are of. Logits are minus infinity
        where an earlier chunk had the token already, and where there is none.
        """
        vocab, here = self.vocab, head.shape[0]
        size = min(SCORE_VOCAB_CHUNK, here)
        all_ids = vocab.ids(here)

        def chunk_logits(start: Array) -> tuple[Array, Array]:
            # The last chunk starts early enough to be whole; what it repeats is masked.
            begin = jnp.minimum(start, here - size)
            if isinstance(head, Quantized):
                rows = head.rows(begin, size)
            else:
                rows = lax.dynamic_slice_in_dim(head, begin, size)
            logits = self.model.partial_logits(rows, hidden, products=self.products)
            ids = lax.dynamic_slice_in_dim(all_ids, begin, size)
            new = (begin + jnp.arange(size, dtype=jnp.int32) >= start) & (ids < vocab.total)
            return jnp.where(new[None], logits, -jnp.inf), ids

        return jnp.arange(0, here, size, dtype=jnp.int32), chunk_logits

    # -- parts ---------------------------------------------------------------------------------

    def _prompt(
        self, params: Params, state: DeviceState, packed: Int[Array, "B X"], count: int
    ) -> tuple[Float[Array, "T D"], DeviceState, Lines]:
        """Runs the tokens of all lines side by side."""
        columns = COLUMNS + self.table_width
        lines = Lines(packed[:, :columns])
        tokens = packed[:, columns:].reshape(1, -1)[:, :count]
        # The places of one line are its own.
        first = _first(lines) if packed.shape[0] > 1 else None
        hidden, state = self._forward(params, state, lines, tokens, first)
        return hidden[0], state, lines

    def _forward(
        self,
        params: Params,
        state: DeviceState,
        lines: Lines,
        tokens: Int[Array, "L T"],
        first: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "L T D"], DeviceState]:
        """Runs T tokens of each line or, with ``first``, ragged ones (``paged_attention``)."""
        start, length = lines.column(Column.START), lines.column(Column.LENGTH)
        table = lines.table
        config = self.model.config

        def attend(
            pools: Pools,
            layer: Array | int,
            q: Array,
            k: Array,
            v: Array,
            rope: Array,
            window: Array | int,
        ) -> tuple[Array, Pools]:
            q, pools = rope_append(
                pools,
                q,
                k,
                v,
                rope,
                table,
                start,
                length,
                layer=layer,
                first=first,
                implementation="auto" if self.has_native else "scatter",
            )
            out = paged_attention(
                q,
                pools,
                table,
                start,
                length,
                layer=layer,
                scale=config.attention_scale,
                first=first,
                window=window,
                softcap=config.attention_softcap,
                implementation="auto" if self.has_native else "blocked",
                narrow=self.narrow,
            )
            return out, pools

        if first is None:
            positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        else:
            places = places_of(first, length, tokens.shape[1])
            positions = (start[places.row] + jnp.where(places.is_real, places.token, 0))[None]
        hidden, pools = self.model.forward(
            params,
            tokens,
            positions,
            state.pools,
            attend,
            tensor_axis=self.tensor_axis,
            products=self.products,
            activations=self.activations,
        )
        return hidden, replace(state, pools=pools)

    def _sample(
        self,
        params: Params,
        state: DeviceState,
        result: Int[Array, "R C"],
        lines: Lines,
        hidden: Float[Array, "B D"],
    ) -> tuple[DeviceState, Int[Array, "R C"]]:
        logits = self.model.lazy_logits(params, hidden, products=self.products)
        with jax.named_scope("sample"):
            chosen = choose(logits, lines, state.counts, state.bias, state.masks, self.vocab)
        null_row = result.shape[0] - 1
        row = jnp.where(lines.samples, lines.column(Column.ROW), null_row)
        token = jnp.maximum(chosen[:, 0], 0)
        place = self.vocab.local(token, state.counts.shape[1])
        state = replace(
            state,
            last_token=state.last_token.at[row].set(token),
            counts=state.counts.at[row, place].add(1, mode="drop"),
        )
        return state, result.at[row].set(chosen)

    def _score(
        self, params: Params, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
    ) -> Int[Array, "T C"]:
        """Log-probability, rank and likeliest tokens of each target, in vocabulary chunks.

        The target's own logit is computed first, from its row of the head alone, so that one pass
        over the chunks can count how many tokens are above it. Every shard passes over its part.
        """
        vocab, head = self.vocab, self.model.head_weight(params)
        here = head.shape[0]
        starts, chunk_logits = self.chunked_logits(head, hidden)

        place = vocab.local(targets, here)
        own = self.model.target_logits(params, hidden, jnp.minimum(place, here - 1))
        own = vocab.sum(jnp.where(place < here, own, 0.0))

        def merge(carry: tuple[Array, Array, Array, Array], start: Array) -> tuple[tuple, None]:
            normaliser, rank, top, top_ids = carry
            logits, ids = chunk_logits(start)
            normaliser = jnp.logaddexp(normaliser, jax.nn.logsumexp(logits, axis=-1))
            above = (logits > own[:, None]) & (ids[None] != targets[:, None])
            rank = rank + jnp.sum(above, axis=-1, dtype=jnp.int32)
            best, where = lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
            values = jnp.concatenate([top, best], axis=1)
            names = jnp.concatenate([top_ids, ids[where]], axis=1)
            top, order = lax.top_k(values, MAX_LOGPROBS)
            return (normaliser, rank, top, jnp.take_along_axis(names, order, axis=1)), None

        places = hidden.shape[0]
        carry = (
            jnp.full((places,), -jnp.inf, jnp.float32),
            jnp.zeros((places,), jnp.int32),
            jnp.full((places, MAX_LOGPROBS), -jnp.inf, jnp.float32),
            jnp.zeros((places, MAX_LOGPROBS), jnp.int32),
        )
        (normaliser, rank, top, top_ids), _ = lax.scan(merge, carry, starts)
        normaliser = vocab.logsumexp(normaliser[:, None])
        rank = 1 + vocab.sum(rank)
        top, top_ids = merge_top(top, top_ids, vocab)
        columns = [
            targets[:, None],
            bits(own - normaliser)[:, None],
            rank[:, None],
            top_ids,
            bits(top - normaliser[:, None]),
        ]
        scores = jnp.concatenate(columns, axis=1)
        assert scores.shape[1] == RESULT_COLUMNS
        return scores


def _first(lines: Lines) -> Int[Array, " B"]:
    """Where the tokens of each line begin: behind those of the line before."""
    length = lines.column(Column.LENGTH)
    return jnp.cumsum(length) - length


def _last(hidden: Float[Array, "T D"], lines: Lines) -> Float[Array, "B D"]:
    """The hidden state of each line's last token (of any, on a padding line)."""
    return hidden[jnp.maximum(_first(lines) + lines.column(Column.LENGTH) - 1, 0)]
