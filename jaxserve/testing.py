"""Doubles that can be worked out by hand: a clock, a runner and a tokenizer.

``CountingRunner`` stands in for the device. Its "model" keeps token ids instead of keys and values
in a paged pool, written and read through the packed page tables, and its next token is a weighted
sum of the whole context as read back. So the answer to a request is one line of arithmetic
(``expected_tokens``), and a page that is shared, freed, evicted or indexed wrongly changes it.
``PacedRunner`` computes nothing and takes its time, for measuring front ends.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from operator import mul
from typing import Any

import numpy as np

from jaxserve.engine.engine import Engine, EngineLimits, Runner
from jaxserve.engine.plan import SchedulerConfig
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
    prompt_columns,
)

JUNK = -7919
"""What a page holds before it is written: reading it gives a wrong answer, not a crash."""


class ManualClock:
    """A clock that moves when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        """Starts at ``now`` seconds."""
        self.now = now

    def __call__(self) -> float:
        """Returns the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds


@dataclass(slots=True)
class CountingHandle:
    """A step of ``CountingRunner``, computed already."""

    result: StepResult
    runner: CountingRunner

    def wait(self) -> StepResult:
        """Returns the result, after whatever ``on_wait`` does."""
        if self.runner.on_wait is not None:
            self.runner.on_wait()
        return self.result


class CountingRunner:
    """A runner whose answers are sums; see the top of this file and ``expected_tokens``."""

    def __init__(self, shape: StepShape, *, num_pages: int, page_tokens: int) -> None:
        """Makes the pool.

        Args:
            shape: the compiled shapes to insist on.
            num_pages: pages, the null page included.
            page_tokens: tokens in one page.
        """
        self.shape = shape
        self.page_tokens = page_tokens
        self.on_dispatch: Callable[[StepInputs], None] | None = None
        """Called before a step is computed; may raise."""
        self.on_wait: Callable[[], None] | None = None
        """Called before a result is handed out; may raise, block, or move a clock."""
        self.poison = POISONED_TOKEN
        """What a poisoned row samples."""
        self.poison_token: int | None = None
        """A row whose context holds this token has logits that are not finite."""
        self.steps = 0
        self.resets = 0
        self.compiles_after_ready = 0
        self._num_pages = num_pages
        self._bias = np.zeros((shape.all_rows, shape.vocab_size), np.float32)
        self._masks: dict[int, np.ndarray] = {}
        self._weights = range(1, shape.table_width * page_tokens + 1)
        self._buckets: dict[str, Container[tuple[int, int]]] = {
            "decode": {(rows, 1) for rows in shape.decode_buckets},
            "prefill": shape.prefill_buckets,
            "score": shape.score_buckets,
            "embed": shape.embed_buckets,
        }
        self._clear()

    def _clear(self) -> None:
        # Lists, because single places are read and written: numpy would be slower.
        pages = self._num_pages * self.shape.data_shards
        self._pool = [[JUNK] * self.page_tokens for _ in range(pages)]
        self._last_token = [JUNK] * self.shape.all_rows
        self._output_counts = [JUNK] * self.shape.all_rows

    def reset(self) -> None:
        """Loses the contents of the pool and of the rows."""
        self.resets += 1
        self._clear()

    def dispatch(self, inputs: StepInputs) -> CountingHandle:
        """Computes a step at once."""
        if self.on_dispatch is not None:
            self.on_dispatch(inputs)
        self.steps += 1
        for setup in inputs.setups:
            self._output_counts[setup.row] = int((setup.counts & (SEEN_IN_PROMPT - 1)).sum())
            self._bias[setup.row] = setup.bias
        if inputs.masks is not None:
            self._masks |= zip(inputs.masks.rows, inputs.masks.words, strict=True)
        result = np.zeros((self.shape.all_rows, RESULT_COLUMNS), np.int32)
        scores = [self._call(call, result) for call in inputs.calls]
        return CountingHandle(StepResult(result, scores), self)

    def _call(self, call: ProgramCall, result: np.ndarray) -> np.ndarray | None:
        decode = call.kind == "decode"
        rows = call.bucket[0]
        shards, columns = self.shape.data_shards, self.shape.line_columns
        size = (shards * rows, columns + (0 if decode else prompt_columns(call.bucket)))
        assert call.buffer.shape == size, f"{call.buffer.shape} is not a compiled shape"
        assert call.bucket in self._buckets[call.kind], f"{call.bucket} is not a {call.kind} bucket"
        parts = call.buffer.reshape(shards, rows, -1)
        for shard, lines in enumerate(parts):
            self._call_shard(shard, lines, result, call.bucket[1], decode=decode)
        if call.kind == "embed":
            return self._embedded(parts)
        if call.kind != "score":
            return None
        return np.stack([_scores(lines[0, columns + 1 :]) for lines in parts])

    def _embedded(self, parts: np.ndarray) -> np.ndarray:
        """Of each line, where its last token stands and what it is; 1 and 0 of padding."""
        columns = self.shape.line_columns
        hidden = np.zeros((*parts.shape[:2], 2), np.float32)
        for shard, lines in enumerate(parts):
            tokens = lines[:, columns:].ravel()
            ends = np.cumsum(lines[:, Column.LENGTH])
            hidden[shard, :, 0] = np.maximum(1, lines[:, Column.START] + lines[:, Column.LENGTH])
            hidden[shard, :, 1] = tokens[np.maximum(ends - 1, 0)]
        return hidden

    def _call_shard(
        self, shard: int, buffer: np.ndarray, result: np.ndarray, places: int, *, decode: bool
    ) -> None:
        columns = self.shape.line_columns
        heads: list[list[int]] = buffer[:, : Column.SUPPRESSED].tolist()
        heads = [head for head in heads if head[Column.LENGTH]]
        assert not buffer[len(heads) :, Column.LENGTH].any(), "padding among the lines"
        lines = buffer[: len(heads)]
        # A shard counts its rows and pages from 0; here one list holds those of all.
        tables = (lines[:, COLUMNS:columns] + shard * self._num_pages).tolist()
        tokens: list[int] = buffer[:, columns:].ravel().tolist()
        assert decode or sum(head[Column.LENGTH] for head in heads) <= places, "too many tokens"
        end = 0
        for head, table in zip(heads, tables, strict=True):
            head[Column.ROW] += shard * self.shape.shard_rows
            start, length = head[Column.START], head[Column.LENGTH]
            if decode:
                self._append(table, start, [self._last_token[head[Column.ROW]]])
            else:
                self._append(table, start, tokens[end : end + length])
                end += length
        # Written before any is read, as on the device: a page that two rows write is noticed.
        for head, table, line in zip(heads, tables, lines, strict=True):
            context = self._read(table, head[Column.START] + head[Column.LENGTH])
            if head[Column.SAMPLES]:
                self._sample(head, line, context, result)

    def _append(self, table: list[int], start: int, tokens: list[int]) -> None:
        size = self.page_tokens
        for place, token in enumerate(tokens, start):
            self._pool[table[place // size]][place % size] = token

    def _read(self, table: list[int], end: int) -> list[int]:
        """Returns a row's context through its page table."""
        pages = table[: -(-end // self.page_tokens)]
        return list(chain.from_iterable([self._pool[page] for page in pages]))[:end]

    def _sample(
        self, head: list[int], line: np.ndarray, context: list[int], result: np.ndarray
    ) -> None:
        row = head[Column.ROW]
        total = 1 + sum(map(mul, context, self._weights))
        if head[Column.TEMPERATURE_BITS]:
            total += (head[Column.SEED_LOW] & 0xFFFFFFFF) + 31 * head[Column.CHOICE]
        if head[Column.USES_COUNTS]:
            total += self._output_counts[row]
        token = total % self.shape.vocab_size
        if head[Column.SUPPRESS_STOP] or head[Column.USES_BIAS] or head[Column.USES_MASK]:
            token = self._allowed(line, row, token)
        if self.poison_token in context:
            token = self.poison
        self._last_token[row] = token
        self._output_counts[row] += 1
        result[row, 0] = token
        if head[Column.LOGPROBS] >= 0:
            result[row] = _scores(np.array([token]))

    def _allowed(self, line: np.ndarray, row: int, token: int) -> int:
        """Returns the first token from ``token`` on, cyclically, that the row may choose."""
        vocab = self.shape.vocab_size
        banned = set[int]()
        if line[Column.SUPPRESS_STOP]:
            banned.update(line[Column.SUPPRESSED : Column.SUPPRESSED + MAX_SUPPRESSED].tolist())
        if line[Column.USES_BIAS]:
            banned.update(np.flatnonzero(np.isneginf(self._bias[row])).tolist())
        if line[Column.USES_MASK]:
            words = self._masks[row]
            banned.update(t for t in range(vocab) if not words[t // 32] >> t % 32 & 1)
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
    """Result lines: log-probability ``-1 - token % 8``, rank ``1 + token % 3``, then -1, -2 ..."""
    lines = np.zeros((len(tokens), RESULT_COLUMNS), np.int32)
    lines[:, 0] = tokens
    lines[:, 1] = (-1.0 - tokens % 8).astype(np.float32).view(np.int32)
    lines[:, 2] = 1 + tokens % 3
    places = np.arange(MAX_LOGPROBS)
    lines[:, 3 : 3 + MAX_LOGPROBS] = tokens[:, None] + places
    lines[:, 3 + MAX_LOGPROBS :] = (-1.0 - places).astype(np.float32).view(np.int32)
    return lines


class PacedRunner:
    """A runner that computes nothing and takes a given time, to measure what is around it.

    Every row gets the letters of the alphabet in turn, one per step.
    """

    def __init__(self, shape: StepShape, *, step_s: float = 0.0) -> None:
        """Makes steps of ``step_s`` seconds, one after the other as on a device."""
        self.step_s = step_s
        self.steps = 0
        self.compiles_after_ready = 0
        self._rows = shape.all_rows
        self._busy_until_s = 0.0

    def reset(self) -> None:
        """Has nothing to lose."""

    def dispatch(self, inputs: StepInputs) -> PacedHandle:
        """Queues a step behind those dispatched before it."""
        letter = ord("a") + self.steps % 26
        self.steps += 1
        rows = np.full((self._rows, RESULT_COLUMNS), letter, np.int32)
        self._busy_until_s = max(time.perf_counter(), self._busy_until_s) + self.step_s
        return PacedHandle(StepResult(rows, [None] * len(inputs.calls)), self._busy_until_s)


@dataclass(slots=True)
class PacedHandle:
    """A step of ``PacedRunner``."""

    result: StepResult
    done_s: float

    def wait(self) -> StepResult:
        """Sleeps until the step's time has come."""
        left = self.done_s - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return self.result


def counting_engine(
    *, clock: Callable[[], float] = time.monotonic, **sizes: Any
) -> tuple[Engine, CountingRunner]:
    """Returns an engine over a ``CountingRunner``, not started.

    Args:
        clock: the engine's.
        **sizes: fields of ``EngineSizes`` and of ``EngineLimits``.
    """
    parts = EngineSizes.of(sizes)
    runner = CountingRunner(parts.shape, num_pages=parts.num_pages, page_tokens=parts.page_tokens)
    return parts.engine(runner, clock, sizes), runner


def paced_engine(*, step_s: float = 0.0, **sizes: Any) -> tuple[Engine, PacedRunner]:
    """Returns an engine over a ``PacedRunner``, not started; arguments as ``counting_engine``."""
    parts = EngineSizes.of(sizes)
    runner = PacedRunner(parts.shape, step_s=step_s)
    return parts.engine(runner, time.monotonic, sizes), runner


@dataclass(frozen=True, kw_only=True)
class EngineSizes:
    """Sizes of a small engine, all of which may be set."""

    max_rows: int = 4
    page_tokens: int = 4
    num_pages: int = 33
    """The null page included."""
    context_tokens: int = 64
    vocab_size: int = 259
    """``ByteTokenizer``'s."""
    end_ids: Sequence[int] = ()
    """None, so that the length of an answer is known."""
    step_tokens: int = 16
    max_chunks: int = 4
    prefix_cache: bool = True
    data_shards: int = 1
    overlap: bool = True

    @classmethod
    def of(cls, values: dict[str, Any]) -> EngineSizes:
        """Takes the sizes out of ``values``; what is left are fields of ``EngineLimits``."""
        names = [item.name for item in fields(cls) if item.name in values]
        return cls(**{name: values.pop(name) for name in names})

    @property
    def shape(self) -> StepShape:
        """Compiled shapes that fit."""
        half = max(1, self.max_rows // 2)
        return StepShape(
            max_rows=self.max_rows,
            table_width=-(-self.context_tokens // self.page_tokens),
            vocab_size=self.vocab_size,
            decode_buckets=tuple(sorted({1, half, self.max_rows})),
            prefill_buckets=tuple(
                (self.max_chunks, tokens)
                for tokens in sorted({max(1, self.step_tokens // 2), self.step_tokens})
            ),
            score_buckets=((1, self.step_tokens),),
            embed_buckets=((self.max_chunks, self.step_tokens),),
            data_shards=self.data_shards,
        )

    def engine(self, runner: Runner, clock: Callable[[], float], limits: dict[str, Any]) -> Engine:
        """Returns an engine of these sizes."""
        return Engine(
            runner,
            scheduler=SchedulerConfig(
                max_rows=self.max_rows,
                step_tokens=self.step_tokens,
                max_chunks=self.max_chunks,
                page_tokens=self.page_tokens,
                num_pages=self.num_pages,
                prefix_cache=self.prefix_cache,
                data_shards=self.data_shards,
            ),
            shape=self.shape,
            limits=EngineLimits(
                context_tokens=self.context_tokens, vocab_size=self.vocab_size, **limits
            ),
            end_ids=self.end_ids,
            overlap=self.overlap,
            clock=clock,
        )


class ScriptedConstraint:
    """A grammar that allows, one place after the other, what it is told; then the answer ends."""

    def __init__(self, *script: Collection[int], fails_at: int | None = None) -> None:
        """Allows ``script[i]`` at place i; passes a limit at place ``fails_at``."""
        self.script = script
        self.fails_at = fails_at

    def matcher(self, tokens: Sequence[int] = ()) -> ScriptedMatcher:
        """Returns a matcher behind ``tokens``."""
        return ScriptedMatcher(self, len(tokens))


@dataclass(slots=True)
class ScriptedMatcher:
    """Where one choice stands in a script."""

    constraint: ScriptedConstraint
    place: int
    error: str = ""

    @property
    def complete(self) -> bool:
        """Whether the script is over."""
        return self.place == len(self.constraint.script)

    def fill(self, words: np.ndarray) -> None:
        """Sets the bits of the tokens that the script has here."""
        words[:] = 0
        if self.place == self.constraint.fails_at:
            self.error = "the script says so"
            return
        for token in self.constraint.script[self.place]:
            words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token_id: int) -> bool:
        """Goes on, if the script has the token here."""
        accepted = token_id in self.constraint.script[self.place]
        self.place += accepted
        return accepted


class ByteTokenizer:
    """One token per byte, then three special ones; the interface of ``frontend.tokenizer``."""

    BOS, EOS, TURN = 256, 257, 258

    source = "bytes"
    bos_id: int | None = BOS
    eos_ids = frozenset({EOS})
    special_ids = frozenset({BOS, EOS, TURN})
    vocab_size = 259
    strips_leading_space = False
    chat_template: str | None = (
        "{% for message in messages %}<turn>{{ message.role }}: {{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant: {% endif %}"
    )
    special_texts: Mapping[str, str] = {"bos_token": "<bos>", "eos_token": "<eos>"}
    digest = "0" * 64
    _texts: Mapping[int, str] = {BOS: "<bos>", EOS: "<eos>", TURN: "<turn>"}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the bytes of ``text``; the text of a special token is read as that token."""
        ids = [self.BOS] if add_special_tokens else []
        for part in re.split("(<bos>|<eos>|<turn>)", text):
            special = next((number for number, name in self._texts.items() if name == part), None)
            ids += part.encode() if special is None else [special]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        skip = self.special_ids if skip_special_tokens else frozenset[int]()
        return b"".join(self.token_bytes(i) for i in ids if i not in skip).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for; empty for an id without an entry."""
        if 0 <= token_id < 256:
            return bytes((token_id,))
        return self._texts.get(token_id, "").encode()

    def token_text(self, token_id: int) -> str:
        """Returns one token as text; half a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")
