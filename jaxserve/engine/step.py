"""StepPlan to StepInputs: packs the rows of a step into bucket-shaped int32 buffers.

A step is one or more program calls, all of which the device runs in order: at most one decode
call, then the prompt chunks grouped into prefill calls. Every call takes one packed buffer, one
line per row of its bucket:

    decode   [B, columns + W]        row data, then the page table
    prefill  [R, columns + W + X]    the same, then R * X places for T tokens and one more

The tokens of a prefill call are ragged: those of its lines stand one behind the other, and may be
as many as all T for one line, or T/R for each. The last place is for the token after the last one,
which a scoring call has to know.

With several data shards a buffer has that many such parts, one behind the other, and each shard is
given its own: it sees rows and pages by their numbers within the shard. All shards run the same
calls, so a bucket is chosen for the fullest, and one with nothing to do computes padding.

The row data of running sequences lives in ``RowTable``, a persistent array with one line per
device row, so packing is a gather and three column writes. Floats travel as their bit patterns.
Lines that pad a bucket belong to the null row, have length 0 and point at the null page.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from jaxserve.engine.constraint import mask_words
from jaxserve.engine.plan import Chunk, StepPlan
from jaxserve.engine.request import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplingParams
from jaxserve.engine.sequence import LiveSequence

MAX_END_TOKENS = 8
MAX_SUPPRESSED = MAX_STOP_TOKEN_IDS + MAX_END_TOKENS
RESULT_COLUMNS = 3 + 2 * MAX_LOGPROBS
"""Of a result line: token, log-probability bits, rank, then ids and log-probability bits."""
CALL_PLACES = 256
"""See ``StepShape.call_places``; of GPUs by their data sheets, not measured."""
MAX_TABLES = 16
"""Of cuts, kept for the shapes of the engines in this process."""

POISONED_TOKEN = -1
"""Sampled when a row's logits hold a NaN or an infinity."""
NO_TOKEN_LEFT = -2
"""Sampled when the request's own rules leave no token."""


class Column(enum.IntEnum):
    """Columns of a packed line. ``*_BITS`` hold the bits of a float32."""

    ROW = 0
    START = 1
    """Position of the line's first token."""
    LENGTH = 2
    """Tokens that are not padding; 0 for a padding line."""
    SAMPLES = 3
    """1 when the last token's logits choose a new token."""
    SUPPRESS_STOP = 4
    """1 while ``min_tokens`` is not reached."""
    USES_COUNTS = 5
    USES_BIAS = 6
    USES_MASK = 7
    """1 when ``MaskUpdate`` says which tokens may be chosen."""
    SEED_LOW = 8
    SEED_HIGH = 9
    CHOICE = 10
    TOP_K = 11
    LOGPROBS = 12
    """Alternatives to report; -1 for no log-probabilities at all."""
    TEMPERATURE_BITS = 13
    TOP_P_BITS = 14
    MIN_P_BITS = 15
    PRESENCE_BITS = 16
    FREQUENCY_BITS = 17
    REPETITION_BITS = 18
    SUPPRESSED = 19
    """First of ``MAX_SUPPRESSED`` columns: end and stop tokens, padded with -1."""


COLUMNS = int(Column.SUPPRESSED) + MAX_SUPPRESSED


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The compiled shapes that steps are packed into."""

    max_rows: int
    """Of each data shard."""
    table_width: int
    """Pages per sequence at most."""
    vocab_size: int
    decode_buckets: tuple[int, ...]
    """Rows, ascending; the largest is at least ``max_rows``."""
    prefill_buckets: tuple[tuple[int, int], ...]
    """(lines, tokens of all lines), ascending by tokens."""
    score_buckets: tuple[tuple[int, int], ...] = ()
    """The same for programs that score prompts, of one line each; empty when none can be scored."""
    embed_buckets: tuple[tuple[int, int], ...] = ()
    """The same for programs that embed prompts; empty when none can be."""
    data_shards: int = 1
    call_places: int = CALL_PLACES
    """Token places that take as long as one more call, which reads every weight again: about the
    operations of a device for each byte that it reads."""

    @property
    def null_row(self) -> int:
        """The device row, of each shard, that padding lines use."""
        return self.max_rows

    @property
    def shard_rows(self) -> int:
        """Device rows of one shard, the null row included."""
        return self.max_rows + 1

    @property
    def all_rows(self) -> int:
        """Device rows of all shards."""
        return self.data_shards * self.shard_rows

    @property
    def line_columns(self) -> int:
        """Columns of a line without its tokens: row data and page table."""
        return COLUMNS + self.table_width


@dataclass(slots=True)
class ProgramCall:
    """One call of one compiled program."""

    kind: str
    """``decode``, ``prefill``, ``score`` (prefill that also scores every prompt position) or
    ``embed`` (prefill that gives back what the last token of each line means)."""
    bucket: tuple[int, int]
    """Of each data shard: (rows, 1), or (lines, tokens)."""
    buffer: np.ndarray
    """int32, see the top of this file."""
    chunks: list[list[Chunk]] = field(default_factory=list[list[Chunk]])
    """For all but decode: of each data shard, the chunk of each line."""

    @property
    def places(self) -> int:
        """Token places of each data shard."""
        return self.bucket[0] if self.kind == "decode" else self.bucket[1]


def prompt_columns(bucket: tuple[int, int]) -> int:
    """Columns of each line of a prefill call that hold its share of the tokens.

    >>> prompt_columns((1, 64)), prompt_columns((16, 64))
    (65, 5)
    """
    lines, tokens = bucket
    return -(-(tokens + 1) // lines)


@dataclass(slots=True)
class RowSetup:
    """Dense per-row state of requests that use penalties, biases or token lists."""

    row: int
    """Counted through all data shards."""
    counts: np.ndarray
    """int32 [V]: output occurrences; bit 30 is set for tokens of the prompt."""
    bias: np.ndarray
    """float32 [V]: added to the logits; minus infinity bans."""


@dataclass(slots=True)
class MaskUpdate:
    """Which tokens the rows of a step may choose that obey a grammar."""

    rows: list[int]
    """Counted through all data shards; at least one."""
    words: np.ndarray
    """int32 [len(rows), mask_words(V)]: see ``Matcher.fill``."""


@dataclass(slots=True)
class StepInputs:
    """Everything that ``Runner.dispatch`` needs for one step."""

    calls: list[ProgramCall]
    setups: list[RowSetup]
    token_places: int
    """Token places that the programs compute, padding included."""
    tokens: int
    """Those that are real."""
    masks: MaskUpdate | None = None
    """None: no row that samples obeys a grammar."""


SEEN_IN_PROMPT = 1 << 30


class RowTable:
    """One packed line per device row, kept up to date as sequences come and grow."""

    def __init__(self, shape: StepShape) -> None:
        """Makes lines that belong to nobody, and the null row's, which never changes."""
        self.shape = shape
        self.lines = np.zeros((shape.all_rows, shape.line_columns), np.int32)
        self.lines[:, Column.ROW] = np.tile(np.arange(shape.shard_rows), shape.data_shards)
        self.lines[:, Column.SUPPRESSED : COLUMNS] = -1

    def use_buckets(self, shape: StepShape) -> None:
        """Packs into the buckets of ``shape`` from now on; the rest of it must be the same."""
        lines = (shape.all_rows, shape.line_columns, shape.vocab_size)
        assert lines == (*self.lines.shape, self.shape.vocab_size), "lines of another shape"
        self.shape = shape

    def admit(self, sequence: LiveSequence) -> RowSetup | None:
        """Fills the line of a sequence's row; returns its dense state when it needs one."""
        line = self.lines[sequence.row]
        sampling = sequence.live.request.sampling
        line[Column.START : COLUMNS] = 0
        line[Column.SUPPRESSED : COLUMNS] = -1
        seed = sequence.live.seed
        line[Column.SEED_LOW] = np.uint32(seed & 0xFFFFFFFF).view(np.int32)
        line[Column.SEED_HIGH] = np.uint32(seed >> 32).view(np.int32)
        line[Column.CHOICE] = sequence.choice
        line[Column.TOP_K] = min(sampling.top_k, self.shape.vocab_size)
        line[Column.LOGPROBS] = -1 if sampling.logprobs is None else sampling.logprobs
        line[Column.TEMPERATURE_BITS : Column.SUPPRESSED] = np.array(
            [
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.presence_penalty,
                sampling.frequency_penalty,
                sampling.repetition_penalty,
            ],
            np.float32,
        ).view(np.int32)
        stops = sorted(sequence.live.stop_ids)
        line[Column.SUPPRESSED : Column.SUPPRESSED + len(stops)] = stops
        uses_counts, uses_bias = _uses_counts(sampling), _uses_bias(sampling)
        line[Column.USES_COUNTS] = uses_counts
        line[Column.USES_BIAS] = uses_bias
        line[Column.USES_MASK] = sequence.matcher is not None
        table = line[COLUMNS:]
        table[:] = 0
        table[: len(sequence.pages)] = sequence.pages
        if not (uses_counts or uses_bias):
            return None
        vocab = self.shape.vocab_size
        return RowSetup(
            sequence.row,
            _counts(sequence, vocab) if uses_counts else np.zeros(vocab, np.int32),
            _bias(sampling, vocab) if uses_bias else np.zeros(vocab, np.float32),
        )

    def grow(self, row: int, index: int, page: int) -> None:
        """Appends a page to a row's table."""
        self.lines[row, COLUMNS + index] = page


def pack_step(plan: StepPlan, table: RowTable) -> StepInputs:
    """Packs a plan into program calls, and brings the row table up to date with it."""
    setups: list[RowSetup] = []
    for sequence in plan.admitted:
        setup = table.admit(sequence)
        if setup is not None:
            setups.append(setup)
    for row, index, page in plan.grown:
        table.grow(row, index, page)
    calls = [_pack_decode(plan, table)] if plan.decode else []
    calls += [_pack_prompts(*prompts, table) for prompts in _divide(plan, table.shape)]
    places = sum(call.places for call in calls) * table.shape.data_shards
    tokens = len(plan.decode) + sum(chunk.count for chunk in plan.chunks)
    return StepInputs(calls, setups, places, tokens, _masks(plan, table.shape.vocab_size))


def _masks(plan: StepPlan, vocab_size: int) -> MaskUpdate | None:
    """What may follow, in the rows that sample and obey a grammar."""
    decode = zip(plan.decode, plan.decode_rows, strict=True)
    held = [(each.matcher, row) for each, row in decode if each.matcher is not None]
    held += [
        (chunk.sequence.matcher, chunk.row)
        for chunk in plan.chunks
        if chunk.last and chunk.sequence.matcher is not None
    ]
    if not held:
        return None
    words = np.zeros((len(held), mask_words(vocab_size)), np.int32)
    for line, (matcher, _) in zip(words, held, strict=True):
        matcher.fill(line)
    return MaskUpdate([row for _, row in held], words)


def _pack_decode(plan: StepPlan, table: RowTable) -> ProgramCall:
    shape = table.shape
    by_shard: list[list[int]] = [[] for _ in range(shape.data_shards)]
    for row in plan.decode_rows:
        by_shard[row // shape.shard_rows].append(row)
    fullest = max(len(rows) for rows in by_shard)
    bucket = next(size for size in shape.decode_buckets if size >= fullest)
    order: list[int] = []
    places: list[int] = []
    """Of the lines that are not padding; the plan goes shard by shard too."""
    for shard, rows in enumerate(by_shard):
        places += range(len(order), len(order) + len(rows))
        order += rows + [_null_row(shard, shape)] * (bucket - len(rows))
    buffer = table.lines.take(order, axis=0)
    buffer[places, Column.START] = plan.decode_positions
    buffer[places, Column.LENGTH] = 1
    buffer[places, Column.SAMPLES] = 1
    buffer[places, Column.SUPPRESS_STOP] = [_suppresses_stop(each) for each in plan.decode]
    return ProgramCall("decode", (bucket, 1), buffer)


def _pack_prompts(
    kind: str, bucket: tuple[int, int], chunks: list[list[Chunk]], table: RowTable
) -> ProgramCall:
    lines = bucket[0]
    shape = table.shape
    first = shape.line_columns
    buffer = np.zeros((shape.data_shards, lines, first + prompt_columns(bucket)), np.int32)
    for shard, (part, own) in enumerate(zip(buffer, chunks, strict=True)):
        part[len(own) :, :first] = table.lines[_null_row(shard, shape)]
        tokens = list[int]()
        for line, chunk in zip(part, own, strict=False):
            _fill_prompt_line(line[:first], chunk, table.lines[chunk.row])
            tokens += chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
        if kind == "score" and own:
            chunk = own[0]
            tokens += chunk.sequence.tokens[chunk.start + chunk.count :][:1]
        places = np.zeros(part[:, first:].shape, np.int32)
        places.flat[: len(tokens)] = tokens
        part[:, first:] = places
    return ProgramCall(kind, bucket, buffer.reshape(-1, buffer.shape[-1]), chunks)


def _fill_prompt_line(line: np.ndarray, chunk: Chunk, row_data: np.ndarray) -> None:
    line[:] = row_data
    line[Column.START] = chunk.start
    line[Column.LENGTH] = chunk.count
    line[Column.SAMPLES] = chunk.last
    line[Column.SUPPRESS_STOP] = chunk.last and _suppresses_stop(chunk.sequence)


def _null_row(shard: int, shape: StepShape) -> int:
    return shard * shape.shard_rows + shape.null_row


type Prompts = tuple[str, tuple[int, int], list[list[Chunk]]]
"""Kind and bucket of a call, and of each data shard the chunk of each line."""


def _divide(plan: StepPlan, shape: StepShape) -> Iterator[Prompts]:
    """Deals the chunks of a step out to calls; a chunk may be cut where a call is full.

    Its pieces are in calls that run in order. Prompts that are scored or embedded have calls of
    their own; those that are scored are not cut.
    """
    scored = _by_shard(plan, shape, "score")
    while any(scored):
        first = [own[:1] for own in scored]
        most = max(chunk.count for own in first for chunk in own)
        yield "score", next(each for each in shape.score_buckets if each[1] >= most), first
        scored = [own[1:] for own in scored]
    for kind, buckets in (("embed", shape.embed_buckets), ("prefill", shape.prefill_buckets)):
        others = _by_shard(plan, shape, kind)
        sizes = tuple(tokens for _, tokens in buckets)
        while any(others):
            most = max(sum(chunk.count for chunk in own) for own in others)
            size = cut(most, sizes, shape.call_places)[0]
            bucket = next(each for each in buckets if each[1] >= size)
            taken = [_take(own, bucket) for own in others]
            yield kind, bucket, [own for own, _ in taken]
            others = [left for _, left in taken]


def _by_shard(plan: StepPlan, shape: StepShape, kind: str) -> list[list[Chunk]]:
    chunks: list[list[Chunk]] = [[] for _ in range(shape.data_shards)]
    for chunk in plan.chunks:
        if _kind(chunk) == kind:
            chunks[chunk.row // shape.shard_rows].append(chunk)
    return chunks


def _take(chunks: list[Chunk], bucket: tuple[int, int]) -> tuple[list[Chunk], list[Chunk]]:
    """What a call has lines and places for, and what is left of the chunks."""
    lines, room = bucket
    taken = list[Chunk]()
    for number, chunk in enumerate(chunks):
        if len(taken) == lines or not room:
            return taken, chunks[number:]
        if chunk.count > room:
            sequence, row, start = chunk.sequence, chunk.row, chunk.start
            rest = Chunk(sequence, row, start + room, chunk.count - room, chunk.last)
            taken.append(Chunk(sequence, row, start, room, last=False))
            return taken, [rest, *chunks[number + 1 :]]
        taken.append(chunk)
        room -= chunk.count
    return taken, []


def cut(count: int, sizes: tuple[int, ...], call_places: int) -> tuple[int, ...]:
    """Divides so many tokens among the cheapest calls, descending.

    Args:
        count: of tokens.
        sizes: of the buckets, ascending.
        call_places: what a call costs beside its places, in places.

    >>> cut(300, (16, 64, 128, 256, 512), 24)
    (256, 44)
    >>> cut(300, (16, 64, 128, 256, 512), 256)
    (300,)
    >>> cut(300, (16, 64, 128), 256)
    (128, 128, 44)
    """
    table = _first_pieces(sizes, call_places)
    pieces = list[int]()
    while count > sizes[-1]:
        pieces.append(sizes[-1])
        count -= sizes[-1]
    while count:
        pieces.append(table[count])
        count -= pieces[-1]
    return tuple(sorted(pieces, reverse=True))


@lru_cache(maxsize=MAX_TABLES)
def _first_pieces(sizes: tuple[int, ...], call_places: int) -> list[int]:
    """Of each count up to the largest size, a piece of the cheapest cut."""
    least, pieces = [0], [0]
    for count in range(1, sizes[-1] + 1):
        whole = next(size for size in sizes if size >= count)
        choices = [(whole, count)]
        choices += [(least[count - size] + size, size) for size in sizes if size < count]
        cost, piece = min(choices, key=lambda choice: (choice[0], -choice[1]))
        least.append(cost + call_places)
        pieces.append(piece)
    return pieces


def _suppresses_stop(sequence: LiveSequence) -> bool:
    # Planning has counted the new token in: it is output number ``sampled``, from 1.
    return sequence.sampled <= sequence.live.request.sampling.min_tokens


def _kind(chunk: Chunk) -> str:
    sequence = chunk.sequence
    if sequence.prompt_logprobs is not None and chunk.start < sequence.prompt_tokens - 1:
        return "score"
    return "embed" if sequence.live.request.embed else "prefill"


def _uses_counts(sampling: SamplingParams) -> bool:
    return bool(
        sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
    )


def _uses_bias(sampling: SamplingParams) -> bool:
    return bool(sampling.logit_bias or sampling.allowed_token_ids or sampling.banned_token_ids)


def _counts(sequence: LiveSequence, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(sequence.tokens, np.int64)
    prompt, output = tokens[: sequence.prompt_tokens], tokens[sequence.prompt_tokens :]
    counts = np.bincount(output, minlength=vocab_size).astype(np.int32)
    counts[prompt] |= SEEN_IN_PROMPT
    return counts


def _bias(sampling: SamplingParams, vocab_size: int) -> np.ndarray:
    bias = np.zeros(vocab_size, np.float32)
    if sampling.allowed_token_ids:
        bias[:] = -np.inf
        bias[list(sampling.allowed_token_ids)] = 0.0
    for token, value in sampling.logit_bias.items():
        bias[token] += value
    bias[list(sampling.banned_token_ids)] = -np.inf
    return bias
