"""Every sampling parameter on vocabularies small enough to work out by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxserve.engine.constraint import mask_words
from jaxserve.engine.request import MAX_LOGPROBS, SamplingParams
from jaxserve.engine.step import (
    COLUMNS,
    NO_TOKEN_LEFT,
    POISONED_TOKEN,
    SEEN_IN_PROMPT,
    Column,
)
from jaxserve.models.decoder import Logits
from jaxserve.runner.sampling import Lines, choose
from jaxserve.runner.vocab import VocabShard
from pallas_kernels.quantized_matmul import Best

WORDS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
"""A vocabulary of four words with known probabilities."""


SHARDS = 1
"""Devices that the vocabulary is split over: every test runs with one and with three."""

NO_MASKS = jnp.zeros((2, 1), jnp.int32)
"""Of two rows, of at most 32 tokens."""


@pytest.fixture(params=[1, 3], ids=["whole", "split"], autouse=True)
def shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SHARDS", request.param)


@cache
def program(shards: int, vocab: int) -> Any:
    """``choose`` over a vocabulary that is split evenly, and padded if need be."""
    axis = "tensor" if shards > 1 else None
    split = PartitionSpec(None, axis)

    def choose_here(
        logits: jax.Array, packed: jax.Array, counts: jax.Array, bias: jax.Array, masks: jax.Array
    ) -> jax.Array:
        own = VocabShard(vocab, axis)
        return choose(Logits.of(logits), Lines(packed), counts, bias, masks, own)

    return jax.jit(
        jax.shard_map(
            choose_here,
            mesh=Mesh(np.array(jax.devices()[:shards]), ("tensor",)),
            in_specs=(split, PartitionSpec(), split, split, PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )


def line(
    sampling: SamplingParams, *, row: int = 0, position: int = 10, **columns: int
) -> np.ndarray:
    """One packed line for a decode step at ``position``."""
    packed = np.zeros(COLUMNS, np.int32)
    packed[Column.ROW] = row
    packed[Column.START], packed[Column.LENGTH] = position - 1, 1
    packed[Column.SAMPLES] = 1
    seed = sampling.seed or 0
    packed[Column.SEED_LOW] = np.uint32(seed & 0xFFFFFFFF).view(np.int32)
    packed[Column.SEED_HIGH] = np.uint32(seed >> 32).view(np.int32)
    packed[Column.TOP_K] = sampling.top_k
    packed[Column.LOGPROBS] = -1 if sampling.logprobs is None else sampling.logprobs
    floats = [
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
    ]
    packed[Column.TEMPERATURE_BITS : Column.SUPPRESSED] = np.array(floats, np.float32).view(
        np.int32
    )
    packed[Column.SUPPRESSED :] = -1
    for name, value in columns.items():
        packed[Column[name]] = value
    return packed


def run(
    logits: np.ndarray,
    lines: list[np.ndarray],
    counts: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    allowed: list[list[int]] | None = None,
) -> np.ndarray:
    """Chooses for every line; rows are padded to one of two sizes, so that little is compiled.

    What pads the vocabulary has logit 0, as rows of zeros in the head give it.
    """
    rows, vocab = len(lines), logits.shape[-1]
    more_rows = (0, (64 if rows <= 64 else 2048) - rows)
    more_vocab = (0, -vocab % SHARDS)
    dense = (
        logits,
        np.zeros((rows, vocab), np.int32) if counts is None else counts,
        np.zeros((rows, vocab), np.float32) if bias is None else bias,
    )
    scores, seen, added = (jnp.asarray(np.pad(x, (more_rows, more_vocab))) for x in dense)
    packed = jnp.asarray(np.pad(np.stack(lines), (more_rows, (0, 0))))
    masks = np.zeros((len(scores), mask_words(vocab)), np.uint32)
    for mask, tokens in zip(masks, allowed or (), strict=False):
        for token in tokens:
            mask[token // 32] |= np.uint32(1 << token % 32)
    words = jnp.asarray(masks.view(np.int32))
    return np.asarray(program(SHARDS, vocab)(scores, packed, seen, added, words))[:rows]


def draws(sampling: SamplingParams, count: int = 2000) -> np.ndarray:
    """Shares of each of the four words over many positions."""
    lines = [line(sampling, position=position) for position in range(1, count + 1)]
    tokens = run(np.tile(WORDS, (count, 1)), lines)[:, 0]
    return np.bincount(tokens, minlength=4) / count


SAMPLED = SamplingParams(temperature=1.0, seed=5)


def test_temperature_zero_takes_the_likeliest_token() -> None:
    assert run(WORDS[None], [line(SamplingParams(temperature=0.0))])[0, 0] == 0


def test_plain_sampling_follows_the_probabilities() -> None:
    """Three standard deviations of 2,000 draws are below 0.034 for every word."""
    np.testing.assert_allclose(draws(SAMPLED), np.exp(WORDS), atol=0.034)


def test_temperature_sharpens_the_distribution() -> None:
    """At 0.5 probabilities are squared: 0.25, 0.0625, 0.0225, 0.01 over 0.345."""
    expected = np.exp(WORDS) ** 2 / np.sum(np.exp(WORDS) ** 2)
    np.testing.assert_allclose(draws(replace(SAMPLED, temperature=0.5)), expected, atol=0.034)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.9}, [0, 1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.6}, [0]),
        ({"min_p": 0.25}, [0, 1, 2]),
        ({"top_k": 2, "top_p": 0.7}, [0, 1]),  # 0.5 of 0.75 is below 0.7 of what top_k left.
        ({"top_k": 2, "top_p": 0.6}, [0]),
        ({"min_p": 0.3, "top_p": 0.95}, [0, 1, 2]),
    ],
    ids=str,
)
def test_filters_leave_exactly_these_words(change: dict[str, float], kept: list[int]) -> None:
    shares = draws(replace(SAMPLED, **change), 512)
    assert sorted(np.flatnonzero(shares).tolist()) == kept


def test_ties_with_the_last_kept_token_stay() -> None:
    logits = np.zeros((512, 4), np.float32)
    lines = [line(replace(SAMPLED, top_k=2), position=place) for place in range(1, 513)]
    assert set(run(logits, lines)[:, 0].tolist()) == {0, 1, 2, 3}


def test_a_row_samples_the_same_token_alone_and_in_company() -> None:
    """Keys come from (seed, choice, position), so neighbours cannot change an answer."""
    logits = np.random.default_rng(1).normal(size=(4, 127)).astype(np.float32)
    params = [
        replace(SAMPLED, seed=7, top_p=0.9),
        SamplingParams(temperature=0.0),
        replace(SAMPLED, seed=9, top_k=5),
        replace(SAMPLED, seed=2**63 + 1),
    ]
    lines = [line(one, row=row, position=3 + row) for row, one in enumerate(params)]
    together = run(logits, lines)[:, 0]
    for row, one in enumerate(params):
        alone = run(logits[row : row + 1], [line(one, position=3 + row)])
        assert alone[0, 0] == together[row]


def test_seed_choice_and_position_each_change_the_draw() -> None:
    logits = np.zeros((4, 1000), np.float32)
    lines = [
        line(SAMPLED),
        line(replace(SAMPLED, seed=5 + 2**32)),
        line(SAMPLED, CHOICE=1),
        line(SAMPLED, position=11),
    ]
    assert len(set(run(logits, lines)[:, 0].tolist())) == 4


def test_penalties_follow_their_formulas() -> None:
    """Repetition divides positive and multiplies negative logits of seen tokens; frequency counts
    outputs, presence only asks whether."""
    logits = np.array([[2.0, 1.9, -1.0, 0.5]], np.float32)
    counts = np.array([[SEEN_IN_PROMPT, 3, 0, 0]], np.int32)
    sampling = SamplingParams(
        temperature=0.0,
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logprobs=0,
    )
    # 2/2 = 1; 1.9/2 - 3*0.5 - 0.25 = -0.8; -1; 0.5.
    assert run(logits, [line(sampling, USES_COUNTS=1)], counts)[0, 0] == 0
    counts[0, 0] |= 2  # Now 1 - 2*0.5 - 0.25 = -0.25 < 0.5.
    assert run(logits, [line(sampling, USES_COUNTS=1)], counts)[0, 0] == 3
    assert run(logits, [line(sampling)], counts)[0, 0] == 0  # Not asked for: not applied.


def test_bias_moves_and_bans() -> None:
    bias = np.array([[0.0, 5.0, 0.0, 0.0], [-np.inf, 0.0, 0.0, 0.0]], np.float32)
    greedy = SamplingParams(temperature=0.0)
    lines = [line(greedy, USES_BIAS=1), line(greedy, row=1, USES_BIAS=1)]
    assert run(np.tile(WORDS, (2, 1)), lines, bias=bias)[:, 0].tolist() == [1, 1]


def test_stop_tokens_cannot_be_chosen_while_suppressed() -> None:
    packed = line(SamplingParams(temperature=0.0), SUPPRESS_STOP=1)
    packed[Column.SUPPRESSED : Column.SUPPRESSED + 2] = [0, 1]
    assert run(WORDS[None], [packed])[0, 0] == 2
    packed[Column.SUPPRESS_STOP] = 0
    assert run(WORDS[None], [packed])[0, 0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_poisoned_row_says_so_and_its_neighbour_is_fine(bad: float) -> None:
    logits = np.tile(WORDS, (2, 1))
    logits[0, 2] = bad
    tokens = run(logits, [line(SAMPLED), line(SamplingParams(temperature=0.0), row=1)])[:, 0]
    assert tokens.tolist() == [POISONED_TOKEN, 0]


def test_rules_that_leave_no_token_say_so() -> None:
    bias = np.full((1, 4), -np.inf, np.float32)
    assert run(WORDS[None], [line(SAMPLED, USES_BIAS=1)], bias=bias)[0, 0] == NO_TOKEN_LEFT


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({}, 2),
        ({"temperature": 1.0, "top_k": 1}, 0),
        ({"logprobs": 0}, 0),
        ({"USES_BIAS": 1}, 0),
        ({"USES_COUNTS": 1}, 0),
        ({"SUPPRESS_STOP": 1}, 0),
        ({"SAMPLES": 0, "LOGPROBS": 0, "USES_BIAS": 1}, 2),  # Nobody's line.
    ],
    ids=str,
)
def test_all_logits_are_asked_for_when_a_line_wants_more_than_the_best(
    wish: dict[str, int], expected: int
) -> None:
    """Told by logits that lie: the best of them is said to be word 2."""
    if SHARDS > 1:
        pytest.skip("nothing here differs between shards")
    best = Best(jnp.ones(2), jnp.full(2, 2, jnp.int32), jnp.ones(2, bool))
    logits = Logits(lambda: jnp.tile(WORDS, (2, 1)), lambda count: best, 4)
    greedy = SamplingParams(temperature=0.0)
    sampling = replace(greedy, **{name: wish[name] for name in wish if name.islower()})
    columns = {name: wish[name] for name in wish if name.isupper()}
    packed = jnp.asarray(np.stack([line(greedy), line(sampling, row=1, **columns)]))
    dense = jnp.zeros((2, 4))
    chosen = choose(logits, Lines(packed), dense.astype(jnp.int32), dense, NO_MASKS, VocabShard(4))
    assert chosen[0, 0] == expected


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SAMPLED], ids=str)
def test_what_pads_the_vocabulary_is_never_chosen_and_never_poisons(
    sampling: SamplingParams,
) -> None:
    """Every word is less likely than the padding's logit of 0 says."""
    if SHARDS > 1:
        pytest.skip("one shard can have any padding")
    logits = np.full((1, 8), np.nan, np.float32)
    logits[0, :4] = WORDS - 20
    dense = jnp.zeros((1, 8))
    packed = jnp.asarray(line(sampling)[None])
    for padding in (0.0, np.inf, np.nan):
        logits[0, 4:] = padding
        lazy = Logits.of(jnp.asarray(logits))
        chosen = choose(
            lazy, Lines(packed), dense.astype(jnp.int32), dense, NO_MASKS[:1], VocabShard(4)
        )
        assert 0 <= chosen[0, 0] < 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_leaves_what_a_grammar_allows_and_other_rows_alone(temperature: float) -> None:
    sampling = replace(SAMPLED, temperature=temperature)
    lines = [line(sampling, row=0, USES_MASK=1), line(replace(sampling, temperature=0.0), row=1)]
    assert run(np.tile(WORDS, (2, 1)), lines, allowed=[[3]])[:, 0].tolist() == [3, 0]


def test_a_mask_reaches_every_word_of_a_vocabulary_of_several_words() -> None:
    """Token 31 is a word's sign bit, 64 the only token of the third word."""
    logits = np.zeros((65, 65), np.float32)
    lines = [line(SAMPLED, row=row, USES_MASK=1) for row in range(65)]
    chosen = run(logits, lines, allowed=[[token] for token in range(65)])[:, 0]
    assert chosen.tolist() == list(range(65))


def test_a_mask_without_a_token_leaves_none() -> None:
    assert run(WORDS[None], [line(SAMPLED, USES_MASK=1)], allowed=[[]])[0, 0] == NO_TOKEN_LEFT


def test_logprobs_are_the_models_own_whatever_the_request_changes() -> None:
    sampling = replace(SAMPLED, temperature=0.0, logprobs=2)
    bias = np.array([[-np.inf, 0.0, 0.0, 0.0]], np.float32)
    result = run(WORDS[None], [line(sampling, USES_BIAS=1)], bias=bias)[0]
    assert result[0] == 1
    assert result[1:2].view(np.float32)[0] == pytest.approx(np.log(0.25), abs=1e-6)
    assert result[2] == 2  # Second likeliest.
    assert result[3:7].tolist() == [0, 1, 2, 3]
    values = result[3 + MAX_LOGPROBS : 7 + MAX_LOGPROBS].view(np.float32)
    np.testing.assert_allclose(values, WORDS, atol=1e-6)


@pytest.mark.parametrize("vocab", [127, 129, 1000])
def test_sampling_agrees_with_a_numpy_oracle(vocab: int) -> None:
    """Filters recomputed with a sort: every draw must lie in what they keep."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 3, (64, vocab)).astype(np.float32)
    params = [
        SamplingParams(
            temperature=float(rng.uniform(0.3, 2)),
            top_p=float(rng.uniform(0.2, 1)),
            top_k=int(rng.integers(0, vocab + 3)),
            min_p=float(rng.uniform(0, 0.2)),
            seed=int(rng.integers(2**63)),
        )
        for _ in range(64)
    ]
    lines = [line(one, row=row, position=row + 1) for row, one in enumerate(params)]
    tokens = run(logits, lines)[:, 0]
    for row, one in enumerate(params):
        assert tokens[row] in oracle_kept(logits[row], one)


def oracle_kept(logits: np.ndarray, sampling: SamplingParams) -> set[int]:
    """min_p, then top_k, then top_p, by sorting, in float64, with slack for float32 rounding."""
    scaled = logits.astype(np.float64) / sampling.temperature
    mass = np.exp(scaled - scaled.max())
    kept = mass >= sampling.min_p * (1 - 1e-5)
    if sampling.top_k:
        kth = np.sort(scaled[kept])[::-1][: sampling.top_k][-1]
        kept &= scaled >= kth - 1e-6
    order = np.argsort(-np.where(kept, mass, 0.0))
    total = np.cumsum(np.where(kept, mass, 0.0)[order])
    count = int(np.searchsorted(total, sampling.top_p * total[-1] * (1 + 1e-5))) + 1
    return {int(token) for token in order[: min(count, int(kept.sum()))]}
