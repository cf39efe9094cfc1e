"""Packing: every column of a line, and which program takes which rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxserve.engine.plan import SchedulerConfig
from jaxserve.engine.request import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.sequence import LiveRequest, LiveSequence
from jaxserve.engine.step import (
    COLUMNS,
    MAX_END_TOKENS,
    MAX_SUPPRESSED,
    RESULT_COLUMNS,
    SEEN_IN_PROMPT,
    Column,
    RowTable,
    StepInputs,
    StepShape,
    cut,
    pack_step,
)
from jaxserve.engine.stream import TokenStream
from tests.engine.driving import Recorder, make_request

VOCAB = 20
SHAPE = StepShape(
    max_rows=3,
    table_width=4,
    vocab_size=VOCAB,
    decode_buckets=(1, 2, 4),
    prefill_buckets=((2, 4), (3, 16)),
    score_buckets=((1, 4), (1, 16)),
)
NULL_LINE = [3, *[0] * 18, *[-1] * MAX_SUPPRESSED, 0, 0, 0, 0]


class Packer:
    """A scheduler with a row table, driven without an engine."""

    def __init__(self, **values: Any) -> None:
        sizes = {"max_rows": 3, "step_tokens": 16, "max_chunks": 4, "page_tokens": 4}
        self.scheduler = Scheduler(SchedulerConfig(**{**sizes, "num_pages": 20, **values}))
        self.table = RowTable(SHAPE)
        self._number = 0

    def add(self, prompt: list[int], *, seed: int = 0, **values: Any) -> LiveSequence:
        request = make_request(f"r{self._number}", prompt, **values)
        live = LiveRequest(
            number=self._number,
            request=request,
            stream=TokenStream("r", 1, Recorder(), on_close=print, on_stop=print),
            seed=seed,
            accepted_s=0.0,
            salt="",
            stop_ids=frozenset(request.sampling.stop_token_ids),
            open_choices=request.sampling.n,
        )
        self._number += 1
        live.make_choices(0.0, 16)
        self.scheduler.enqueue(live.sequences[0])
        return live.sequences[0]

    def step(self, token: int = 7) -> StepInputs:
        plan = self.scheduler.plan(0.0)
        inputs = pack_step(plan, self.table)
        for chunk in plan.chunks:
            self.scheduler.commit(chunk.sequence, chunk.start + chunk.count)
            if chunk.last:
                chunk.sequence.tokens.append(token)
        for sequence, position in zip(plan.decode, plan.decode_positions, strict=True):
            self.scheduler.commit(sequence, position + 1)
            sequence.tokens.append(token)
        return inputs


def floats(line: np.ndarray, column: Column) -> float:
    return float(line[column : column + 1].view(np.float32)[0])


def test_the_layout_adds_up() -> None:
    assert MAX_SUPPRESSED == MAX_STOP_TOKEN_IDS + MAX_END_TOKENS
    assert COLUMNS == Column.SUPPRESSED + MAX_SUPPRESSED
    assert SHAPE.line_columns == COLUMNS + 4
    assert SHAPE.null_row == 3
    assert RESULT_COLUMNS == 3 + 2 * MAX_LOGPROBS


def test_a_prompt_line_holds_every_parameter() -> None:
    packer = Packer()
    sequence = packer.add(
        [5, 6, 7, 8, 9],
        seed=(3 << 32) + 0xFFFFFFFF,
        temperature=0.5,
        top_p=0.25,
        top_k=1000,
        min_p=0.125,
        logprobs=2,
        min_tokens=1,
        max_tokens=4,
        stop_token_ids=(11, 4),
    )

    (call,) = packer.step().calls

    assert (call.kind, call.bucket, call.buffer.shape) == ("prefill", (3, 16), (3, COLUMNS + 10))
    assert call.buffer.dtype == np.int32
    assert [[chunk.sequence for chunk in own] for own in call.chunks] == [[sequence]]
    line = call.buffer[0]
    ints = {
        Column.ROW: 0,
        Column.START: 0,
        Column.LENGTH: 5,
        Column.SAMPLES: 1,
        Column.SUPPRESS_STOP: 1,
        Column.USES_COUNTS: 0,
        Column.USES_BIAS: 0,
        Column.USES_MASK: 0,
        Column.SEED_LOW: -1,
        Column.SEED_HIGH: 3,
        Column.CHOICE: 0,
        Column.TOP_K: VOCAB,
        Column.LOGPROBS: 2,
    }
    assert {column: int(line[column]) for column in ints} == ints
    values = {
        Column.TEMPERATURE_BITS: 0.5,
        Column.TOP_P_BITS: 0.25,
        Column.MIN_P_BITS: 0.125,
        Column.PRESENCE_BITS: 0.0,
        Column.FREQUENCY_BITS: 0.0,
        Column.REPETITION_BITS: 1.0,
    }
    assert {column: floats(line, column) for column in values} == values
    assert set(ints) | set(values) | {Column.SUPPRESSED} == set(Column)
    assert line[Column.SUPPRESSED : COLUMNS].tolist() == [4, 11, *[-1] * (MAX_SUPPRESSED - 2)]
    assert line[COLUMNS : COLUMNS + 4].tolist() == [1, 2, 0, 0]
    assert call.buffer[:, COLUMNS + 4 :].tolist() == [[5, 6, 7, 8, 9, 0], [0] * 6, [0] * 6]


def test_no_log_probabilities_is_minus_one_and_none_beside_the_chosen_is_zero() -> None:
    packer = Packer()
    packer.add([1])
    packer.add([2], logprobs=0)

    (call,) = packer.step().calls

    assert call.buffer[:2, Column.LOGPROBS].tolist() == [-1, 0]


def test_a_chunk_that_is_scored_carries_the_token_after_each_place() -> None:
    packer = Packer(step_tokens=4)
    packer.add([5, 6, 7, 8, 9, 10], prompt_logprobs=0)

    (first,), (second,) = packer.step().calls, packer.step().calls

    assert first.buffer[0, COLUMNS + 4 :].tolist() == [5, 6, 7, 8, 9]
    assert first.buffer[0, [Column.START, Column.LENGTH, Column.SAMPLES]].tolist() == [0, 4, 0]
    assert second.buffer[0, COLUMNS + 4 :].tolist() == [9, 10, 0, 0, 0]
    assert second.buffer[0, [Column.START, Column.LENGTH, Column.SAMPLES]].tolist() == [4, 2, 1]


def test_decode_lines_point_at_the_next_position_and_padding_at_the_null_row() -> None:
    packer = Packer()
    for number in range(3):
        packer.add([number] * (number + 3))
    packer.step()

    (call,) = packer.step().calls

    assert (call.kind, call.bucket, call.buffer.shape) == ("decode", (4, 1), (4, COLUMNS + 4))
    assert call.buffer[:, Column.ROW].tolist() == [0, 1, 2, 3]
    assert call.buffer[:, Column.START].tolist() == [3, 4, 5, 0]
    assert call.buffer[:, Column.LENGTH].tolist() == [1, 1, 1, 0]
    assert call.buffer[:, Column.SAMPLES].tolist() == [1, 1, 1, 0]
    assert call.buffer[3].tolist() == NULL_LINE
    assert call.chunks == []


def test_lines_that_pad_a_prompt_call_belong_to_the_null_row() -> None:
    packer = Packer()
    packer.table.shape = StepShape(
        max_rows=3,
        table_width=4,
        vocab_size=VOCAB,
        decode_buckets=(4,),
        prefill_buckets=((4, 4),),
    )
    packer.add([1, 2])

    (call,) = packer.step().calls

    assert call.bucket == (4, 4)
    assert call.buffer[:, COLUMNS + 4 :].ravel().tolist() == [1, 2, *[0] * 6]
    for line in call.buffer[1:]:
        assert line[: COLUMNS + 4].tolist() == NULL_LINE
    assert packer.table.lines[SHAPE.null_row].tolist() == NULL_LINE


def test_a_page_added_while_decoding_reaches_the_table() -> None:
    packer = Packer()
    sequence = packer.add([1, 2, 3])
    packer.step()
    assert packer.step().calls[0].buffer[0, COLUMNS:].tolist() == [1, 0, 0, 0]

    (call,) = packer.step().calls

    assert call.buffer[0, COLUMNS:].tolist() == [*sequence.pages, 0, 0] == [1, 2, 0, 0]


def test_the_buffer_of_a_step_does_not_change_when_the_table_does() -> None:
    packer = Packer()
    packer.add([1, 2, 3])
    packer.step()
    before = packer.step().calls[0].buffer
    copy = before.copy()

    packer.step()

    np.testing.assert_array_equal(before, copy)


def test_a_row_that_changes_hands_keeps_nothing_of_its_last_owner() -> None:
    packer = Packer()
    first = packer.add(
        [1] * 9, temperature=2.0, seed=9, logprobs=3, stop_token_ids=(1, 2, 3), presence_penalty=1.0
    )
    packer.step()
    packer.scheduler.finish(first)
    second = packer.add([2, 3])

    (call,) = packer.step().calls

    fresh = Packer()
    fresh.add([2, 3])
    (expected,) = fresh.step().calls
    expected.buffer[0, COLUMNS] = second.pages[0]
    np.testing.assert_array_equal(call.buffer, expected.buffer)


def test_a_readmitted_sequence_gets_its_new_row_and_its_new_pages() -> None:
    packer = Packer(prefix_cache=False)
    first, second = packer.add([1] * 5), packer.add([2] * 5)
    packer.step()
    packer.scheduler.preempt_all()
    packer.scheduler.finish(first)

    (call,) = packer.step().calls

    assert second.row == call.buffer[0, Column.ROW]
    assert call.buffer[0, COLUMNS : COLUMNS + 2].tolist() == second.pages
    assert call.buffer[0, Column.LENGTH] == 6
    assert call.buffer[0, COLUMNS + 4 : COLUMNS + 10].tolist() == [2, 2, 2, 2, 2, 7]


def test_stop_tokens_are_suppressed_until_min_tokens_are_there() -> None:
    packer = Packer()
    packer.add([1, 2], min_tokens=2, max_tokens=8)

    suppressed = [int(packer.step().calls[0].buffer[0, Column.SUPPRESS_STOP]) for _ in range(4)]

    assert suppressed == [1, 1, 0, 0]


def test_a_resumed_answer_counts_its_tokens_towards_min_tokens() -> None:
    packer = Packer()
    packer.add([1, 2], resume=[3], min_tokens=2, max_tokens=8, seed=1)

    suppressed = [int(packer.step().calls[0].buffer[0, Column.SUPPRESS_STOP]) for _ in range(3)]

    assert suppressed == [1, 0, 0]


# -- which program -------------------------------------------------------------------------------


def test_the_smallest_decode_bucket_that_fits_is_taken() -> None:
    packer = Packer()
    sizes: list[tuple[int, int]] = []
    for number in range(3):
        packer.add([number])
        packer.step()
        sizes.append(packer.step().calls[0].bucket)

    assert sizes == [(1, 1), (2, 1), (4, 1)]


@pytest.mark.parametrize(
    ("lengths", "buckets"),
    [
        ([3], [(2, 4)]),
        ([5], [(3, 16)]),
        ([1, 3], [(2, 4)]),
        ([2, 3, 4], [(3, 16)]),
        ([3, 9, 2], [(3, 16)]),
        ([1, 1, 1], [(2, 4), (2, 4)]),
        ([5, 5, 6], [(3, 16)]),
    ],
)
def test_chunks_share_the_cheapest_calls(
    lengths: list[int], buckets: list[tuple[int, int]]
) -> None:
    packer = Packer()
    for number, length in enumerate(lengths):
        packer.add([number + 1] * length)

    inputs = packer.step()

    assert [call.bucket for call in inputs.calls] == buckets
    assert inputs.tokens == sum(lengths)
    assert inputs.token_places == sum(tokens for _, tokens in buckets)
    packed = [int(line[Column.LENGTH]) for call in inputs.calls for line in call.buffer]
    assert [length for length in packed if length] == lengths


SIZES = (16, 64, 128, 256, 512)


@pytest.mark.parametrize("call_places", [1, 24, 256])
def test_no_cut_into_two_or_three_is_cheaper(call_places: int) -> None:
    def cost(*pieces: int) -> int:
        return sum(min(size for size in SIZES if size >= piece) + call_places for piece in pieces)

    for count in range(1, 513, 7):
        pieces = cut(count, SIZES, call_places)
        assert sum(pieces) == count
        assert list(pieces) == sorted(pieces, reverse=True)
        ours = cost(*pieces)
        assert ours <= cost(count)
        assert all(ours <= cost(a, count - a) for a in range(1, count))
        two_full = [(a, b) for a in SIZES for b in SIZES if a + b < count]
        assert all(ours <= cost(a, b, count - a - b) for a, b in two_full)


def test_more_than_the_largest_size_takes_several() -> None:
    assert cut(1100, SIZES, 256) == (512, 512, 76)


def test_pieces_of_a_prompt_stand_in_order_and_the_last_one_samples() -> None:
    packer = Packer()
    packer.table.shape = replace(SHAPE, call_places=1)
    prompt = list(range(1, 11))
    packer.add(prompt)

    calls = packer.step().calls

    assert [call.bucket for call in calls] == [(2, 4)] * 3
    lines = [line for call in calls for line in call.buffer if line[Column.LENGTH]]
    assert [int(line[Column.START]) for line in lines] == [0, 4, 8]
    assert [int(line[Column.LENGTH]) for line in lines] == [4, 4, 2]
    assert [int(line[Column.SAMPLES]) for line in lines] == [0, 0, 1]
    first = packer.table.shape.line_columns
    tokens = [call.buffer[:, first:].ravel()[: call.buffer[0, Column.LENGTH]] for call in calls]
    assert np.concatenate(tokens).tolist() == prompt


def test_a_prompt_that_fills_a_call_goes_on_in_the_next_one_before_the_others() -> None:
    packer = Packer()
    packer.table.shape = replace(SHAPE, prefill_buckets=((2, 4),))
    for prompt in ([1, 2, 3], [4, 5, 6], [7, 8]):
        packer.add(prompt)

    calls = packer.step().calls

    columns = [Column.ROW, Column.START, Column.LENGTH, Column.SAMPLES]
    lines = [call.buffer[:, columns].tolist() for call in calls]
    assert lines == [[[0, 0, 3, 1], [1, 0, 1, 0]], [[1, 1, 2, 1], [2, 0, 2, 1]]]
    first = packer.table.shape.line_columns
    tokens = [call.buffer[:, first:].ravel()[:4].tolist() for call in calls]
    assert tokens == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [[chunk.count for chunk in call.chunks[0]] for call in calls] == [[3, 1], [2, 2]]


def test_prompts_to_be_scored_go_to_programs_that_score_one_call_each() -> None:
    packer = Packer()
    packer.add([1, 2, 3], prompt_logprobs=1)
    packer.add([4, 5, 6])
    packer.add([7, 8, 9], prompt_logprobs=0)

    calls = packer.step().calls

    assert [(call.kind, call.bucket) for call in calls] == [
        ("score", (1, 4)),
        ("score", (1, 4)),
        ("prefill", (2, 4)),
    ]
    assert [len(call.chunks) for call in calls] == [1, 1, 1]


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    packer = Packer()
    packer.add([1], prompt_logprobs=1)

    assert [call.kind for call in packer.step().calls] == ["prefill"]


def test_only_the_chunks_that_reach_into_the_prompt_are_scored() -> None:
    packer = Packer(step_tokens=4)
    packer.add([1, 2, 3], resume=[4, 5, 6], prompt_logprobs=1, seed=1)

    assert [packer.step().calls[0].kind for _ in range(2)] == ["score", "prefill"]


# -- dense state ---------------------------------------------------------------------------------


def test_most_rows_need_no_dense_state() -> None:
    packer = Packer()
    packer.add([1, 2], temperature=1.0, top_k=5)

    assert packer.step().setups == []


def test_penalties_count_the_output_and_mark_the_prompt() -> None:
    packer = Packer()
    packer.add([1, 1, 2], resume=[2, 3, 3], repetition_penalty=1.5, seed=1)

    inputs = packer.step()

    (setup,) = inputs.setups
    assert setup.row == 0
    assert setup.counts[:4].tolist() == [0, SEEN_IN_PROMPT, SEEN_IN_PROMPT + 1, 2]
    assert not setup.counts[4:].any()
    assert not setup.bias.any()
    line = inputs.calls[0].buffer[0]
    assert (line[Column.USES_COUNTS], line[Column.USES_BIAS]) == (1, 0)
    assert floats(line, Column.REPETITION_BITS) == 1.5


def test_token_lists_and_biases_become_one_bias_per_token() -> None:
    packer = Packer()
    packer.add(
        [1], logit_bias={2: 1.5, 5: -3.0}, allowed_token_ids=(2, 3, 4), banned_token_ids=(4,)
    )

    inputs = packer.step()

    (setup,) = inputs.setups
    assert setup.bias[:6].tolist() == [-math.inf, -math.inf, 1.5, 0.0, -math.inf, -math.inf]
    assert np.isneginf(setup.bias[6:]).all()
    assert not setup.counts.any()
    line = inputs.calls[0].buffer[0]
    assert (line[Column.USES_COUNTS], line[Column.USES_BIAS]) == (0, 1)


def test_a_readmitted_sequence_counts_what_it_has_said_so_far() -> None:
    packer = Packer()
    packer.add([1, 2], frequency_penalty=1.0)
    packer.step(token=9)
    packer.step(token=9)
    packer.scheduler.preempt_all()

    (setup,) = packer.step().setups

    assert setup.counts[[1, 2, 9]].tolist() == [SEEN_IN_PROMPT, SEEN_IN_PROMPT, 2]
