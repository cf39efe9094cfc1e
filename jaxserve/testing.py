"""Doubles that can be worked out by hand: a clock, a runner and a tokenizer.

``CountingRunner`` stands in for the device. Its "model" keeps token ids instead of keys and values
in a paged pool, written and read through the packed page tables, and its next token is a weighted
sum of the whole context as read back. So the answer to a request is one line of arithmetic
(``expected_tokens``), and a page that is shared, freed, evicted or indexed wrongly changes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.engine.publish import StepResult
from jaxserve.engine.request import MAX_LOGPROBS
from jaxserve.engine.step import (
    COLUMNS,
    MAX_SUPPRESSED,
    NO_TOKEN_LEFT,
    POISONED_TOKEN,
    RESULT_COLUMNS,
    SEEN_IN_PROMPT,
    Column,
    ProgramCall,
    StepInputs,
    StepShape,
)

JUNK = -7919
"""What a page holds before it is written: reading it gives a wrong answer, not a crash."""


class ManualClock:
    """A clock that moves when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds


@dataclass(slots=True)
class CountingHandle:
    """A step of ``CountingRunner``."""

    result: StepResult
    runner: CountingRunner
    done_s: float

    def wait(self) -> StepResult:
        """Returns the result, when the step's time has come."""
        if self.runner.step_s:
            time.sleep(max(0.0, self.done_s - time.perf_counter()))
        if self.runner.on_wait is not None:
            self.runner.on_wait()
        return self.result


class CountingRunner:
    """A runner whose answers are sums; see the top of this file and ``expected_tokens``."""

    def __init__(
        self, shape: StepShape, *, num_pages: int, page_tokens: int, step_s: float = 0.0
    ) -> None:
        """Makes the pool.

        Args:
            shape: the compiled shapes to insist on.
            num_pages: pages, the null page included.
            page_tokens: tokens in one page.
            step_s: seconds that a step takes at least, for benchmarks of what is around it.
        """
        self.shape = shape
        self.page_tokens = page_tokens
        self.step_s = step_s
        self.on_dispatch: Callable[[StepInputs], None] | None = None
        """Called before a step is computed; may raise."""
        self.on_wait: Callable[[], None] | None = None
        """Called before a result is handed out; may raise, block, or move a clock."""
        self.poison_token: int | None = None
        """A row whose context holds this token has logits that are not finite."""
        self.steps = 0
        self.resets = 0
        self.compiles_after_ready = 0
        rows = shape.max_rows + 1
        self._pool = np.zeros((num_pages, page_tokens), np.int64)
        self._last_token = np.zeros(rows, np.int64)
        self._output_counts = np.zeros(rows, np.int64)
        self._bias = np.zeros((rows, shape.vocab_size), np.float32)
        self._weights = np.arange(1, shape.table_width * page_tokens + 1)
        self._busy_until_s = 0.0
        self._clear()

    def _clear(self) -> None:
        self._pool[:] = JUNK
        self._last_token[:] = JUNK
        self._output_counts[:] = JUNK

    def reset(self) -> None:
        """Loses the contents of the pool and of the rows."""
        self.resets += 1
        self._clear()

    def dispatch(self, inputs: StepInputs) -> CountingHandle:
        """Computes a step at once; the handle pretends that it took time."""
        if self.on_dispatch is not None:
            self.on_dispatch(inputs)
        self.steps += 1
        for setup in inputs.setups:
            self._output_counts[setup.row] = int((setup.counts & (SEEN_IN_PROMPT - 1)).sum())
            self._bias[setup.row] = setup.bias
        result = np.zeros((self.shape.max_rows + 1, RESULT_COLUMNS), np.int32)
        scores = [self._call(call, result) for call in inputs.calls]
        now = time.perf_counter() if self.step_s else 0.0
        self._busy_until_s = max(now, self._busy_until_s) + self.step_s
        return CountingHandle(StepResult(result, scores), self, self._busy_until_s)

    def _call(self, call: ProgramCall, result: np.ndarray) -> np.ndarray | None:
        extra = 0 if call.kind == "decode" else call.bucket[1] + 1
        columns = self.shape.line_columns
        assert call.buffer.shape == (call.bucket[0], columns + extra), "not a compiled shape"
        assert call.buffer.dtype == np.int32
        lines = call.buffer[call.buffer[:, Column.LENGTH] > 0]
        tables = lines[:, COLUMNS:columns]
        starts, lengths = lines[:, Column.START], lines[:, Column.LENGTH]
        if call.kind == "decode":
            assert call.bucket in [(rows, 1) for rows in self.shape.decode_buckets]
            page = tables[np.arange(len(lines)), starts // self.page_tokens]
            self._pool[page, starts % self.page_tokens] = self._last_token[lines[:, Column.ROW]]
        else:
            assert call.bucket in self.shape.prefill_buckets
            for line, table, start, length in zip(lines, tables, starts, lengths, strict=True):
                place = np.arange(start, start + length)
                self._pool[table[place // self.page_tokens], place % self.page_tokens] = line[
                    columns : columns + length
                ]
        self._sample(lines, self._read(tables, starts + lengths), result)
        return _scores(lines[0, columns + 1 :]) if call.kind == "score" else None

    def _read(self, tables: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns each row's context through its page table, zero past its end."""
        longest = int(ends.max())
        pages = self._pool[tables[:, : -(-longest // self.page_tokens)]]
        context = pages.reshape(len(tables), -1)
        return context * (np.arange(context.shape[1]) < ends[:, None])

    def _sample(self, lines: np.ndarray, context: np.ndarray, result: np.ndarray) -> None:
        vocab = self.shape.vocab_size
        total = 1 + context @ self._weights[: context.shape[1]]
        rows = lines[:, Column.ROW]
        sampled = lines[:, Column.TEMPERATURE_BITS] != 0
        total += sampled * (lines[:, Column.SEED_LOW] + 31 * lines[:, Column.CHOICE])
        total += lines[:, Column.USES_COUNTS] * self._output_counts[rows]
        tokens = total % vocab
        if lines[:, [Column.SUPPRESS_STOP, Column.USES_BIAS]].any():
            tokens = np.array(
                [self._allowed(line, int(token)) for line, token in zip(lines, tokens, strict=True)]
            )
        if self.poison_token is not None:
            tokens[(context == self.poison_token).any(axis=1)] = POISONED_TOKEN
        chosen = lines[:, Column.SAMPLES] > 0
        rows, tokens = rows[chosen], tokens[chosen]
        self._last_token[rows] = tokens
        self._output_counts[rows] += 1
        result[rows, 0] = tokens
        if (lines[:, Column.LOGPROBS] >= 0).any():
            result[rows] = _scores(tokens)

    def _allowed(self, line: np.ndarray, token: int) -> int:
        """Returns the first token from ``token`` on, cyclically, that the row may choose."""
        vocab = self.shape.vocab_size
        banned = set[int]()
        if line[Column.SUPPRESS_STOP]:
            banned.update(line[Column.SUPPRESSED : Column.SUPPRESSED + MAX_SUPPRESSED].tolist())
        if line[Column.USES_BIAS]:
            banned.update(np.flatnonzero(np.isneginf(self._bias[line[Column.ROW]])).tolist())
        free = (number % vocab for number in range(token, token + vocab))
        return next((number for number in free if number not in banned), NO_TOKEN_LEFT)


def expected_tokens(
    prompt: Sequence[int],
    count: int,
    *,
    vocab_size: int,
    seed: int | None = None,
    choice: int = 0,
    penalised: bool = False,
    banned: Iterable[int] = (),
) -> list[int]:
    """Returns the answer that ``CountingRunner`` gives.

    Args:
        prompt: token ids.
        count: tokens of the answer.
        vocab_size: of the model.
        seed: the request's seed when its temperature is above 0.
        choice: which of its n choices.
        penalised: whether a penalty is on: then the number of output tokens is added.
        banned: tokens that cannot be chosen; the next higher one is taken.
    """
    context, forbidden = list(prompt), set(banned)
    salt = 0 if seed is None else (seed & 0xFFFFFFFF) + 31 * choice
    for output in range(count):
        total = sum((place + 1) * token for place, token in enumerate(context))
        token = (1 + total + salt + output * penalised) % vocab_size
        while token in forbidden:
            token = (token + 1) % vocab_size
        context.append(token)
    return context[len(prompt) :]


def _scores(tokens: np.ndarray) -> np.ndarray:
    """Result lines: ``-1 - token % 8`` as log-probability, rank ``1 + token % 3``, then -1, -2 ..."""
    lines = np.zeros((len(tokens), RESULT_COLUMNS), np.int32)
    lines[:, 0] = tokens
    lines[:, 1] = (-1.0 - tokens % 8).astype(np.float32).view(np.int32)
    lines[:, 2] = 1 + tokens % 3
    places = np.arange(MAX_LOGPROBS)
    lines[:, 3 : 3 + MAX_LOGPROBS] = tokens[:, None] + places
    lines[:, 3 + MAX_LOGPROBS :] = (-1.0 - places).astype(np.float32).view(np.int32)
    return lines
