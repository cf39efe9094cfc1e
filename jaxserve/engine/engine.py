"""The engine: one thread that drains the inbox, plans, dispatches and publishes.

    submit ─inbox─> [ drain, plan, pack, dispatch(n), wait(n-1), publish(n-1) ] ──> streams

One step is in flight: step n is dispatched before step n-1 is read, so the device works while
Python thinks. Without overlap step n-1 is read first: a device that is this very processor gains
nothing from it, and a request that arrives meanwhile joins the next step. It is read first, too,
when one of its rows obeys a grammar: what may follow is not known before. ``run_once`` is one turn
of that loop; the thread calls it for ever, the simulator calls it by hand. What other threads may
touch is the inbox, the door (``admission.py``) and the streams.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxserve.engine.admission import Admission, EngineLimits, describe
from jaxserve.engine.data_shard import shard_stats
from jaxserve.engine.fit import check_fit
from jaxserve.engine.measures import PHASES, EngineMeasures, Measures
from jaxserve.engine.page_news import PageFeed, PageNews
from jaxserve.engine.page_states import page_states
from jaxserve.engine.plan import SchedulerConfig, StepPlan
from jaxserve.engine.prefix import SHARED
from jaxserve.engine.publish import Publisher, StepHandle
from jaxserve.engine.request import FinishReason, Request, SamplingParams
from jaxserve.engine.scheduler import PRIORITY_SECONDS, Scheduler
from jaxserve.engine.sequence import LiveRequest
from jaxserve.engine.stats import EngineStats, RateMeter
from jaxserve.engine.step import RowTable, StepInputs, StepShape, pack_step
from jaxserve.engine.stream import TokenStream, Waker
from jaxserve.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    JaxserveError,
    RequestCancelledError,
    RequestFailedError,
    ShuttingDownError,
)

logger = logging.getLogger(__name__)

MAX_STEP_FAILURES = 3  # In a row; then the device is taken for lost and the engine ends.
STUCK_POLL_S = 0.05
"""How often to look again when requests are live and yet nothing can be done for them. No state
is known in which that lasts; if there is one, it must neither spin nor sleep for ever."""


class FatalStepError(Exception):
    """A runner cannot go on: the engine ends at once, and says this."""


@runtime_checkable
class Runner(Protocol):
    """The device side of a step."""

    def dispatch(self, inputs: StepInputs) -> StepHandle:
        """Starts a step without waiting for it."""
        ...

    def reset(self) -> None:
        """Makes the pool and the per-row state anew after a step raised; contents are lost."""
        ...

    @property
    def compiles_after_ready(self) -> int:
        """Programs compiled since the runner said it was ready."""
        ...


@dataclass(frozen=True)
class Health:
    """Whether the engine can answer, and why not."""

    serving: bool
    detail: str


@dataclass(slots=True)
class _InFlight:
    plan: StepPlan
    inputs: StepInputs
    handle: StepHandle
    dispatched_s: float
    """On the clock of ``time.perf_counter``."""


class Engine:
    """See the top of this file. ``submit``, ``abort``, ``stats``, ``measures``, ``pages`` and
    ``health`` from any thread."""

    def __init__(
        self,
        runner: Runner,
        *,
        scheduler: SchedulerConfig,
        shape: StepShape,
        limits: EngineLimits,
        end_ids: Sequence[int],
        overlap: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes an engine that does not run yet.

        Args:
            runner: the device side.
            scheduler: bounds of a step and of the pool.
            shape: the compiled shapes; they have to take whatever the scheduler may plan.
            limits: bounds of a request and of the queue.
            end_ids: the model's end tokens; at most ``step.MAX_END_TOKENS``.
            overlap: whether a step is dispatched before the one before it is read.
            clock: seconds, monotonic; deadlines are on it.
        """
        check_fit(scheduler, shape, limits, end_ids)
        self.limits = limits
        self.scheduler = Scheduler(scheduler)
        self._runner = runner
        self._table = RowTable(shape)
        self._end_ids = frozenset(end_ids)
        self._measures = Measures(context_tokens=limits.context_tokens)
        self._publisher = Publisher(self.scheduler, self._measures)
        self._overlap = overlap
        self._clock = clock
        self._admission = Admission(limits)
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._work = threading.Event()
        self._numbers = itertools.count()
        self._deadlines: list[tuple[float, int, LiveRequest]] = []
        self._in_flight: _InFlight | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failures = 0
        self._progress_s = clock()
        self._steps = self._places = self._tokens = 0
        self._step_ended_s = 0.0
        self._rate = RateMeter()
        self._news = PageNews([shard.prefix for shard in self.scheduler.shards])
        self._shards_seen = tuple(map(shard_stats, self.scheduler.shards))
        """After the last turn: one tuple, so that a reader sees one instant."""

    # -- any thread ----------------------------------------------------------------------------

    def submit(self, request: Request, waker: Waker) -> TokenStream:
        """Takes a request in, without waiting.

        Raises:
            InvalidRequestError: a value that no retry can make right (also PromptTooLongError and
                DuplicateRequestError).
            QueueFullError: a bound of the queue is reached; retry later.
            DrainingError: the server is shutting down; retry elsewhere.
            DeadlineExceededError: the deadline is already past.
            EngineDeadError: the engine has ended.
        """
        try:
            return self._submit(request, waker)
        except JaxserveError as error:
            self._admission.count_refusal(error.reason)
            raise

    def _submit(self, request: Request, waker: Waker) -> TokenStream:
        limits = self.limits
        request.validate(
            vocab_size=limits.vocab_size,
            context_tokens=limits.context_tokens,
            prompt_logprobs=limits.prompt_logprobs,
            embeddings=limits.embeddings,
        )
        self._check_stops(request.sampling)
        now = self._clock()
        if request.deadline_s is not None and request.deadline_s <= now:
            raise DeadlineExceededError(request.request_id, 0)
        live = self._make_live(request, waker, now)
        if self._admission.admit(live):
            self._progress_s = now  # The watchdog counts from the first work after idleness.
        self._send(self._enqueue, live)
        return live.stream

    def abort(self, request_id: str) -> None:
        """Ends a live request with CANCELLED.

        Raises:
            RequestNotFoundError: no live request has this id.
        """
        self._send(self._cancel, self._admission.find(request_id))

    def use_shape(self, shape: StepShape) -> None:
        """Packs the steps to come into other buckets, whose programs are there by now.

        Args:
            shape: the engine's, but for its buckets.

        Raises:
            ValueError: something that may be planned fits none of them.
        """
        check_fit(self.scheduler.config, shape, self.limits, tuple(self._end_ids))
        self._send(self._table.use_buckets, shape)

    def watch_pages(self, feed: PageFeed) -> None:
        """Tells a feed which pages a prompt may find, and every change from then on.

        With the prefix cache off no page outlives its request, and there is nothing to tell.
        """
        self._send(self._news.watch, feed)

    def unwatch_pages(self, feed: PageFeed) -> None:
        """Tells a feed no more."""
        self._send(self._news.unwatch, feed)

    def fail(self, error: Exception) -> None:
        """Ends the engine with an error, for those who know first that it cannot go on."""
        self._send(self._raise, error)

    def drain(self) -> None:
        """Refuses new requests from now on; accepted ones go on."""
        self._admission.drain()

    @property
    def draining(self) -> bool:
        """True after ``drain`` or ``stop``."""
        return self._admission.draining

    @property
    def idle(self) -> bool:
        """True when no accepted request is left."""
        return not self._admission.live

    @property
    def dead(self) -> BaseException | None:
        """What ended the engine, if anything did."""
        return self._admission.dead

    def health(self) -> Health:
        """Truthful health: a step finished recently, or there was nothing to do."""
        if self.dead is not None:
            return Health(False, f"the engine has ended: {describe(self.dead)}")
        if self.draining:
            return Health(False, "draining")
        age = self._progress_age_s()
        if age > self.limits.watchdog_s:
            return Health(False, f"no step has finished for {age:.0f} s while work is waiting")
        return Health(True, "serving")

    def stats(self) -> EngineStats:
        """Returns a snapshot. Pages add up; other numbers may be a step apart."""
        now = self._clock()
        scheduler, admission, publisher = self.scheduler, self._admission, self._publisher
        shards = self._shards_seen
        lookups = sum(shard.prefix_lookup_tokens for shard in shards)
        return EngineStats(
            rows_running=sum(shard.rows_running for shard in shards),
            rows_max=sum(shard.rows_max for shard in shards),
            # The queue also holds choices of requests that have been scheduled: preempted ones,
            # and those that share the first one's prompt.
            requests_waiting=max(admission.waiting, scheduler.waiting),
            tokens_waiting=admission.waiting_tokens,
            pages_total=sum(shard.pages_total for shard in shards),
            pages_free=sum(shard.pages_free for shard in shards),
            pages_used=sum(shard.pages_used for shard in shards),
            pages_cached=sum(shard.pages_cached for shard in shards),
            page_tokens=scheduler.config.page_tokens,
            queue_age_seconds=admission.queue_age_s(now),
            output_tokens_per_second=self._rate.rate(now),
            prompt_tokens_total=publisher.prompt_tokens,
            output_tokens_total=publisher.output_tokens,
            requests_accepted_total=admission.accepted,
            requests_finished_total=dict(publisher.finish_counts),
            requests_rejected_total=admission.rejected,
            preemptions_total=scheduler.preemptions,
            steps_total=self._steps,
            prefix_hit_rate=sum(shard.prefix_hit_tokens for shard in shards) / max(1, lookups),
            compiles_after_ready=self._runner.compiles_after_ready,
            padding_waste=1.0 - self._tokens / self._places if self._places else 0.0,
            phase_seconds_total={
                phase: self._measures.phase_seconds[phase].sum for phase in PHASES
            },
            last_step_age_seconds=self._progress_age_s(),
            healthy=self.health().serving,
            draining=self.draining,
            data_shards=shards,
        )

    def measures(self) -> EngineMeasures:
        """Returns the distributions of what has happened since the start."""
        return self._measures.snapshot(self._admission.refusals())

    def pages(self) -> Future[list[np.ndarray]]:
        """Asks for a picture of the pool; the engine thread takes it between two steps.

        Returns:
            To wait for: for each data shard, uint8 by page as of ``page_states``. It never
            comes from an engine that has ended.
        """
        picture: Future[list[np.ndarray]] = Future()
        self._send(self._take_picture, picture)
        return picture

    def _progress_age_s(self) -> float:
        return 0.0 if self.idle else max(0.0, self._clock() - self._progress_s)

    # -- the thread ----------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the loop thread."""
        assert self._thread is None, "the engine runs already"
        self._progress_s = self._clock()
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop; whatever still runs is cancelled. Safe to call again."""
        self._admission.drain()
        self._stopping = True
        self._work.set()
        if self._thread is None:
            self._cancel_all()
        else:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self.run_once():
                    self._work.wait(None if self.idle else STUCK_POLL_S)
                    self._work.clear()
            self._cancel_all()
        except BaseException as error:
            logger.exception("the engine thread has ended")
            self._die(error)

    def run_once(self) -> bool:
        """Takes one turn of the loop; returns False when there was nothing to do."""
        worked = self._drain_inbox()
        if self.idle and self._in_flight is None:
            return worked
        previous, self._in_flight = self._in_flight, None
        reads_first = previous is not None and (
            not self._overlap or previous.inputs.masks is not None
        )
        if previous is not None and reads_first:
            self._publish(previous)
            self._drain_inbox()
        now = self._clock()
        self._expire(now)
        plan = self._plan(now)
        failure = None if plan.empty else self._dispatch(plan)
        if previous is not None and not reads_first:
            self._publish(previous)
        if failure is not None:
            self._step_failed(plan, failure)
        self._deliver()
        return worked or previous is not None or not plan.empty

    def _plan(self, now: float) -> StepPlan:
        start = time.perf_counter()
        plan = self.scheduler.plan(now)
        if plan.admitted:
            self._admission.scheduled(sequence.live for sequence in plan.admitted)
        self._timed("plan", start)
        return plan

    def _dispatch(self, plan: StepPlan) -> Exception | None:
        """Puts a step in flight, or returns what it raised."""
        start = time.perf_counter()
        try:
            inputs = pack_step(plan, self._table)
            packed = self._timed("pack", start)
            handle = self._runner.dispatch(inputs)
        except Exception as error:
            return error
        self._timed("dispatch", packed)
        self._places += inputs.token_places
        self._tokens += inputs.tokens
        self._in_flight = _InFlight(plan, inputs, handle, packed)
        return None

    def _publish(self, step: _InFlight) -> None:
        start = time.perf_counter()
        try:
            result = step.handle.wait()
        except Exception as error:
            self._step_failed(step.plan, error)
            return
        waited = self._timed("wait", start)
        self._measure(step, waited)
        now = self._clock()
        before = self._publisher.output_tokens
        self._publisher.publish(step.plan, step.inputs.calls, result, now)
        self._rate.add(now, self._publisher.output_tokens - before)
        self._steps += 1
        self._failures = 0
        self._progress_s = now
        self._timed("publish", waited)

    def _measure(self, step: _InFlight, ended_s: float) -> None:
        plan, measures = step.plan, self._measures
        kind = "decode" if not plan.chunks else "mixed" if plan.decode else "prefill"
        # A step that was dispatched while another ran began when that one ended.
        began_s = max(step.dispatched_s, self._step_ended_s)
        measures.step_seconds[kind].observe(ended_s - began_s)
        measures.step_tokens.observe(step.inputs.tokens)
        self._step_ended_s = ended_s

    def _deliver(self) -> None:
        # The pages first: whoever sees that no request is left must see no page in use.
        self._shards_seen = tuple(map(shard_stats, self.scheduler.shards))
        finished = self._publisher.finished_requests
        if finished:
            self._admission.forget(finished)
            finished.clear()
        self._news.tell()
        self._publisher.wake()

    def _step_failed(self, plan: StepPlan, error: Exception) -> None:
        """Fails the requests of a step that raised; the others are computed again."""
        if isinstance(error, FatalStepError):
            raise error
        logger.error("a step failed; its requests are ended", exc_info=error)
        self._failures += 1
        if self._failures >= MAX_STEP_FAILURES:
            raise error
        now = self._clock()
        for sequence in plan.sequences():
            live = sequence.live
            failure = RequestFailedError(live.request.request_id, "the step it was part of raised")
            self._publisher.finish_request(live, FinishReason.ERROR, now, failure)
        # The pool was donated to the step and may be gone: start from an empty one, and drop the
        # step that was dispatched on top of it.
        self._in_flight = None
        self.scheduler.preempt_all()
        self._runner.reset()

    def _timed(self, phase: str, start: float) -> float:
        now = time.perf_counter()
        self._measures.phase_seconds[phase].observe(now - start)
        return now

    # -- messages ------------------------------------------------------------------------------

    def _send(self, action: Callable[..., None], *arguments: Any) -> None:
        self._inbox.append((action, arguments))
        self._work.set()

    def _drain_inbox(self) -> bool:
        worked = bool(self._inbox)
        while self._inbox:
            action, arguments = self._inbox.popleft()
            action(*arguments)
        return worked

    def _enqueue(self, live: LiveRequest) -> None:
        if live.open_choices:
            if live.request.deadline_s is not None:
                self._watch_deadline(live, live.request.deadline_s)
            self.scheduler.enqueue(live.sequences[0])

    def _check_stops(self, sampling: SamplingParams) -> None:
        """Refuses a request that may choose end and stop tokens only, and must not yet."""
        if not sampling.min_tokens or not sampling.allowed_token_ids:
            return
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._end_ids)}
        if not {*sampling.allowed_token_ids} - {*sampling.banned_token_ids} - stops:
            raise InvalidRequestError(
                f"min_tokens is {sampling.min_tokens}, and every allowed token ends the answer, "
                "so none is left before; allow another token or lower min_tokens to 0",
                field="min_tokens",
            )

    def _raise(self, error: Exception) -> None:
        raise error

    def _take_picture(self, picture: Future[list[np.ndarray]]) -> None:
        # A reader that has given up has cancelled it.
        if picture.set_running_or_notify_cancel():
            picture.set_result([page_states(shard.pool) for shard in self.scheduler.shards])

    def _cancel(self, live: LiveRequest) -> None:
        error = RequestCancelledError(live.request.request_id)
        self._publisher.finish_request(live, FinishReason.CANCELLED, self._clock(), error)

    def _stop_choice(self, live: LiveRequest, choice: int) -> None:
        self._publisher.finish(live.sequences[choice], FinishReason.STOP, self._clock())

    def _watch_deadline(self, live: LiveRequest, deadline_s: float) -> None:
        # Entries of requests that ended in time are dropped when they outnumber the live ones.
        if len(self._deadlines) > 64 and len(self._deadlines) > 2 * self._admission.live:
            self._deadlines = [entry for entry in self._deadlines if entry[2].open_choices]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline_s, live.number, live))

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            live = heapq.heappop(self._deadlines)[2]
            if live.open_choices:
                output = sum(sequence.output_tokens for sequence in live.sequences)
                error = DeadlineExceededError(live.request.request_id, output)
                self._publisher.finish_request(live, FinishReason.DEADLINE, now, error)

    # -- beginnings and endings ----------------------------------------------------------------

    def _make_live(self, request: Request, waker: Waker, now: float) -> LiveRequest:
        number = next(self._numbers)
        stream = TokenStream(
            request.request_id,
            request.sampling.n,
            waker,
            on_close=partial(self._close_stream, number),
            on_stop=partial(self._stop_stream, number),
        )
        shared = self.scheduler.config.prefix_cache
        live = LiveRequest(
            number=number,
            request=request,
            stream=stream,
            seed=secrets.randbits(32) if request.sampling.seed is None else request.sampling.seed,
            accepted_s=now,
            # With the cache off only the choices of one request share pages.
            salt=SHARED + request.cache_salt if shared else f"request/{number}",
            stop_ids=self._end_ids_for(request.sampling),
            open_choices=request.sampling.n,
        )
        order = now + request.priority * PRIORITY_SECONDS
        live.make_choices(order, self.limits.context_tokens)
        return live

    def _end_ids_for(self, sampling: SamplingParams) -> frozenset[int]:
        own = frozenset(sampling.stop_token_ids)
        return own if sampling.ignore_eos else own | self._end_ids

    def _close_stream(self, number: int, request_id: str) -> None:
        # The number tells this request from a later one with the same id.
        live = self._admission.get(request_id)
        if live is not None and live.number == number:
            self._send(self._cancel, live)

    def _stop_stream(self, number: int, request_id: str, choice: int) -> None:
        live = self._admission.get(request_id)
        if live is not None and live.number == number:
            self._send(self._stop_choice, live, choice)

    def _cancel_all(self) -> None:
        self._drain_inbox()
        for live in self._admission.live_requests():
            error = ShuttingDownError(live.request.request_id)
            self._publisher.finish_request(live, FinishReason.CANCELLED, self._clock(), error)
        self._deliver()
        if self._in_flight is not None:
            # The runner is closed next, and the device must not be using it then.
            with contextlib.suppress(Exception):
                self._in_flight.handle.wait()
            self._in_flight = None

    def _die(self, cause: BaseException) -> None:
        self._admission.die(cause)
        error = EngineDeadError(describe(cause))
        orphans = self._admission.live_requests()
        for live in orphans:
            self._publisher.abandon(live, self._clock(), error)
        self._publisher.finished_requests.clear()
        self._admission.forget(orphans)
        self._publisher.wake()

    def check_integrity(self) -> None:
        """Verifies the ledger, and that an idle engine holds nothing; engine thread or stopped."""
        self.scheduler.check_integrity()
        self._admission.check_integrity()
        if self.idle:
            for shard in self.scheduler.shards:
                assert not shard.pool.used, f"{shard.pool.used} pages leaked"
            assert not self.scheduler.waiting, (
                f"{self.scheduler.waiting} places in the queue leaked"
            )
