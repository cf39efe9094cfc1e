"""Turns the result of a step into events: the host half of a token's life after the device.

Decides when a choice ends (end token, stop token, length, a poisoned row), commits computed
positions to the scheduler, and collects the streams that have to be woken. Engine thread only.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from jaxserve.engine.measures import Measures
from jaxserve.engine.plan import Chunk, StepPlan
from jaxserve.engine.request import (
    MAX_LOGPROBS,
    EmbeddingEvent,
    Event,
    FinishedEvent,
    FinishReason,
    SamplingParams,
    StartedEvent,
    Timing,
    TokenEvent,
    TokenLogprobs,
)
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.sequence import LiveRequest, LiveSequence
from jaxserve.engine.step import NO_TOKEN_LEFT, POISONED_TOKEN, ProgramCall
from jaxserve.engine.stream import TokenStream
from jaxserve.errors import InvalidRequestError, JaxserveError, RequestFailedError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepResult:
    """What the device said about one step."""

    rows: np.ndarray
    """int32 [all_rows, RESULT_COLUMNS]: the newest sample of every device row of all shards."""
    scores: list[np.ndarray | None]
    """Per program call: None; of ``score`` int32 [data_shards, T, RESULT_COLUMNS], the token after
    each place of the shard's prompt; of ``embed`` float32 [data_shards, lines, D]."""


@runtime_checkable
class StepHandle(Protocol):
    """A dispatched step."""

    def wait(self) -> StepResult:
        """Blocks until the step has run; raises what it raised."""
        ...


class Publisher:
    """Delivers events and finishes choices."""

    def __init__(self, scheduler: Scheduler, measures: Measures) -> None:
        """Reports to ``scheduler`` what was computed and what has ended."""
        self._scheduler = scheduler
        self._measures = measures
        self._published_s = math.nan
        self._measured = 0
        """Output tokens whose latency has been observed, or that were the first of their choice."""
        self._touched: list[TokenStream] = []
        self.finished_requests: list[LiveRequest] = []
        """Requests whose last choice ended since the engine last took them out."""
        self.finish_counts = {reason.value: 0 for reason in FinishReason}
        self.output_tokens = 0
        self.prompt_tokens = 0

    def publish(
        self, plan: StepPlan, calls: list[ProgramCall], result: StepResult, now: float
    ) -> None:
        """Publishes a step that has run; sequences that ended meanwhile are passed over."""
        tokens: list[int] = result.rows[:, 0].tolist()
        for call, scores in zip(calls, result.scores, strict=True):
            if scores is not None:
                for own, shard_scores in zip(call.chunks, scores, strict=True):
                    if call.kind == "embed":
                        self._embed(own, shard_scores, now)
                    elif own:
                        self._collect_scores(own[0], shard_scores)
        for chunk in plan.chunks:
            if not chunk.sequence.done:
                self._publish_chunk(chunk, tokens[chunk.row], result, now)
        for sequence, row, position in zip(
            plan.decode, plan.decode_rows, plan.decode_positions, strict=True
        ):
            if not sequence.done:
                self._publish_token(sequence, row, position + 1, tokens[row], result, now)
        if steady := self.output_tokens - self._measured:
            # Choices that had a token in the publication before this one, too, waited equally
            # long: one observation, however many rows there are.
            self._measures.inter_token_latency.observe(now - self._published_s, steady)
            self._measured = self.output_tokens
        self._published_s = now

    def _publish_chunk(self, chunk: Chunk, token: int, result: StepResult, now: float) -> None:
        sequence = chunk.sequence
        live = sequence.live
        end = chunk.start + chunk.count
        self.prompt_tokens += chunk.count
        if not live.started and (sequence.prompt_logprobs is None or chunk.last):
            self._start(sequence)
        if not chunk.last:
            if sequence.row == chunk.row:
                self._scheduler.commit(sequence, end)
            return
        if live.request.embed:
            if sequence.row == chunk.row:
                self._scheduler.commit(sequence, end)
            self.finish(sequence, FinishReason.STOP, now)
            return
        self._publish_token(sequence, chunk.row, end, token, result, now)

    def _embed(self, chunks: list[Chunk], hidden: np.ndarray, now: float) -> None:
        """Delivers what prompts mean whose last token a call has computed."""
        for chunk, line in zip(chunks, hidden, strict=False):
            sequence = chunk.sequence
            if not chunk.last or sequence.done:
                continue
            if not sequence.live.started:
                self._start(sequence)
            length = math.sqrt(float(np.square(line, dtype=np.float64).sum()))
            if not math.isfinite(length) or not length:
                self._fail(sequence, POISONED_TOKEN, now)
                continue
            vector = tuple((line / np.float32(length)).tolist())
            self.put(sequence.live.stream, EmbeddingEvent(vector))

    def _start(self, sequence: LiveSequence) -> None:
        live = sequence.live
        live.started = True
        scores, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        event = StartedEvent(
            live.request.request_id,
            live.seed,
            live.cached_tokens,
            None if scores is None else tuple(scores),
        )
        self.put(live.stream, event)

    def _publish_token(
        self,
        sequence: LiveSequence,
        row: int,
        committed: int,
        token: int,
        result: StepResult,
        now: float,
    ) -> None:
        """Publishes the token that followed ``committed`` computed positions."""
        live = sequence.live
        if token < 0:
            self._fail(sequence, token, now)
            return
        # Preempted since the step was planned: the token is good, the pages are gone. (It cannot
        # have come back to the same row: admission waits for this publication.)
        if sequence.row == row:
            self._scheduler.commit(sequence, committed)
        if not live.choices_queued:
            self._queue_choices(live)
        tokens = sequence.tokens
        tokens.append(token)
        self.output_tokens += 1
        last_s, sequence.last_token_s = sequence.last_token_s, now
        if last_s != self._published_s:
            self._measure(sequence, last_s, now)
        sampling = live.request.sampling
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = read_logprobs(result.rows[row], sampling.logprobs)
        output = len(tokens) - sequence.prompt_tokens
        self.put(live.stream, TokenEvent(sequence.choice, output - 1, token, logprobs))
        matcher = sequence.matcher
        if token in live.stop_ids and output > sampling.min_tokens:
            self.finish(sequence, FinishReason.STOP, now, stop_token_id=token)
        elif matcher is not None and not matcher.accept(token):
            why = f"it does not go on behind token {token} ({matcher.error})"
            self.finish(sequence, FinishReason.ERROR, now, error=_of_grammar(why))
        elif matcher is not None and matcher.complete:
            self.finish(sequence, FinishReason.STOP, now)
        elif len(tokens) >= sequence.max_total:
            self.finish(sequence, FinishReason.LENGTH, now)

    def _measure(self, sequence: LiveSequence, last_s: float | None, now: float) -> None:
        """Observes a choice's first token, or one that came later than in every step."""
        self._measured += 1
        if last_s is not None:
            self._measures.inter_token_latency.observe(now - last_s)
            return
        live = sequence.live
        sequence.first_token_s = now
        if live.first_token_s is None:
            live.first_token_s = now
            self._measures.began(live, now)

    def _queue_choices(self, live: LiveRequest) -> None:
        """Queues the other choices of a request, for which the first one's prompt is there now."""
        live.choices_queued = True
        for sequence in live.sequences[1:]:
            if not sequence.done:
                self._scheduler.enqueue(sequence)

    def _fail(self, sequence: LiveSequence, token: int, now: float) -> None:
        matcher = sequence.matcher
        if matcher is not None and matcher.error:
            self.finish(sequence, FinishReason.ERROR, now, error=_of_grammar(matcher.error))
            return
        error: JaxserveError
        if token == NO_TOKEN_LEFT:
            error = _none_left(sequence.live.request.sampling)
        else:
            self._scheduler.distrust(sequence)
            why = "the model's logits are not finite"
            error = RequestFailedError(sequence.live.request.request_id, why)
        self.finish(sequence, FinishReason.ERROR, now, error=error)

    def _collect_scores(self, chunk: Chunk, scores: np.ndarray) -> None:
        sequence = chunk.sequence
        collected = sequence.prompt_logprobs
        assert collected is not None, "scores of a prompt that were not asked for"
        wanted = sequence.live.request.sampling.prompt_logprobs or 0
        end = min(chunk.start + chunk.count, sequence.prompt_tokens - 1)
        collected.extend(read_logprobs(scores[place], wanted) for place in range(end - chunk.start))

    # -- endings -------------------------------------------------------------------------------

    def finish(
        self,
        sequence: LiveSequence,
        reason: FinishReason,
        now: float,
        *,
        error: Exception | None = None,
        stop_token_id: int | None = None,
    ) -> None:
        """Ends one choice: its pages are free at once, its stream hears why."""
        if not sequence.done:
            self._scheduler.finish(sequence)
            self._end(sequence, reason, now, error, stop_token_id)
            live = sequence.live
            if live.open_choices == 0:
                self.finished_requests.append(live)
                if live.answered:
                    self._measures.answered(live, now)
            elif not live.choices_queued:
                # Ended before its prompt was computed; the others do without.
                self._queue_choices(live)

    def finish_request(
        self, live: LiveRequest, reason: FinishReason, now: float, error: Exception
    ) -> None:
        """Ends every open choice of a request."""
        live.choices_queued = True
        for sequence in live.sequences:
            self.finish(sequence, reason, now, error=error)

    def abandon(self, live: LiveRequest, now: float, error: Exception) -> None:
        """Tells a stream that the engine is dead; touches nothing that may be broken."""
        for sequence in live.sequences:
            if not sequence.done:
                sequence.done = True
                self._end(sequence, FinishReason.ERROR, now, error, None)

    def _end(
        self,
        sequence: LiveSequence,
        reason: FinishReason,
        now: float,
        error: Exception | None,
        stop_token_id: int | None,
    ) -> None:
        live = sequence.live
        live.open_choices -= 1
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            live.answered = False
        self.finish_counts[reason.value] += 1
        event = FinishedEvent(
            choice=sequence.choice,
            reason=reason,
            prompt_tokens=sequence.prompt_tokens,
            output_tokens=sequence.output_tokens,
            cached_tokens=live.cached_tokens,
            timing=timing(live, now),
            error=error,
            stop_token_id=stop_token_id,
        )
        self.put(live.stream, event, ends_choice=True)

    # -- waking --------------------------------------------------------------------------------

    def put(self, stream: TokenStream, event: Event, *, ends_choice: bool = False) -> None:
        """Appends an event and remembers whom to wake."""
        if stream.put(event, ends_choice=ends_choice):
            self._touched.append(stream)

    def wake(self) -> None:
        """Wakes every reader whose stream was empty before, each waker once."""
        touched, self._touched = self._touched, []
        by_waker: dict[int, list[TokenStream]] = {}
        for stream in touched:
            by_waker.setdefault(id(stream.waker), []).append(stream)
        for streams in by_waker.values():
            try:
                streams[0].waker.wake(streams)
            except Exception:
                # A front end that is going away must not take the engine with it.
                logger.exception("waking the readers of %d streams failed", len(streams))


def _of_grammar(why: str) -> InvalidRequestError:
    """What a grammar's limits, met in mid-answer, are to whoever sent it: a grammar to change."""
    return InvalidRequestError(
        f"the grammar cannot go on here: {why}; send a simpler one", field="grammar"
    )


def _none_left(sampling: SamplingParams) -> InvalidRequestError:
    """What rules of a request that contradict each other are, wherever the answer meets it."""
    rules = ("allowed_token_ids", "banned_token_ids", "min_tokens")
    return InvalidRequestError(
        "min_tokens, grammar, allowed and banned tokens leave no token to choose; loosen one",
        field=next((name for name in rules if getattr(sampling, name)), "grammar"),
    )


def timing(live: LiveRequest, now: float) -> Timing:
    """Returns the queue, first-token and total time of a request so far."""
    start = live.accepted_s
    return Timing(
        queue_s=(now if live.scheduled_s is None else live.scheduled_s) - start,
        first_token_s=0.0 if live.first_token_s is None else live.first_token_s - start,
        total_s=now - start,
    )


def read_logprobs(line: np.ndarray, alternatives: int) -> TokenLogprobs:
    """Reads one result line (see ``step.RESULT_COLUMNS``)."""
    ids = line[3 : 3 + alternatives]
    values = line[3 + MAX_LOGPROBS : 3 + MAX_LOGPROBS + alternatives].view(np.float32)
    return TokenLogprobs(
        logprob=float(line[1:2].view(np.float32)[0]),
        rank=int(line[2]),
        top_ids=tuple(ids.tolist()),
        top_logprobs=tuple(values.tolist()),
    )
