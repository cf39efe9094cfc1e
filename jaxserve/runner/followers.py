"""The same step on every host of the mesh: plans out, digests back.

    host 0     Engine ─> LeaderRunner.dispatch: StepPlan n to every follower, then its own call
                         GroupHandle.wait: its own result, or the loss of a host
    follower   follow_steps: StepPlan n, its own call, then the digest of what it sampled

A follower decides nothing: it has the same programs and weights, and a plan holds every byte that
they are called with. Plans go over a plain TCP stream, because a JAX collective costs milliseconds
and its key-value store most of one. Only what changed is sent: the columns of a row that stay from
step to step are known to both sides (``LineMirror``), so a decode step of 64 rows takes about 2 KB.

Every way to part is found and named: a gap in the numbers, other tokens, a host that stands still
(``group.py``), one that dies. The group then ends; nothing is mended in place.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    InvalidStateError,
    ThreadPoolExecutor,
    wait,
)
from contextlib import suppress
from typing import Any

import numpy as np

from jaxserve.engine.constraint import mask_words
from jaxserve.engine.engine import FatalStepError, Runner
from jaxserve.engine.publish import StepHandle, StepResult
from jaxserve.engine.step import (
    Column,
    MaskUpdate,
    ProgramCall,
    RowSetup,
    StepInputs,
    StepShape,
    prompt_columns,
)
from jaxserve.errors import GroupError
from jaxserve.internal.v1 import group_pb2 as pb
from jaxserve.runner.group import Group, GroupGoodbye, Member

DIGEST_BYTES = 16
MAX_STEPS_APART = 64
"""Steps whose digests host 0 keeps; a follower may not report later than that."""
CAUSE_PATIENCE_S = 2.0
"""A step that fails because a host died may fail before the loss is known; then it is waited for,
so that the error can name the host."""
_HEAD = (Column.START, Column.LENGTH, Column.SAMPLES, Column.SUPPRESS_STOP)
"""Columns that are sent for every line, after its row. Those behind them stay with the row."""
_STAYING = int(Column.SUPPRESS_STOP) + 1
_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")


class LineMirror:
    """What the other side knows of every row: a line of ``RowTable``, as it was last sent."""

    def __init__(self, shape: StepShape) -> None:
        """Knows nothing yet: every line is zero on both sides."""
        self._shape = shape
        self._lines = np.zeros((shape.all_rows, shape.line_columns - _STAYING), np.int32)

    def encode(self, inputs: StepInputs, sequence: int) -> pb.StepPlan:
        """Writes a step; only what the other side does not know of each line."""
        setups = [
            pb.RowSetup(
                row=setup.row,
                counts=setup.counts.astype(_INT32).tobytes(),
                bias=setup.bias.astype(_FLOAT32).tobytes(),
            )
            for setup in inputs.setups
        ]
        masks = inputs.masks
        return pb.StepPlan(
            sequence=sequence,
            setups=setups,
            calls=[self._encode_call(c) for c in inputs.calls],
            mask_rows=np.array(masks.rows, _INT32).tobytes() if masks else b"",
            mask_words=masks.words.astype(_INT32).tobytes() if masks else b"",
        )

    def _encode_call(self, call: ProgramCall) -> pb.ProgramCall:
        shape, buffer = self._shape, call.buffer
        rows = buffer[:, Column.ROW] + self._first_rows(call.bucket[0])
        staying = buffer[:, _STAYING : shape.line_columns]
        changed = np.flatnonzero((staying != self._lines[rows]).any(axis=1)).astype(_INT32)
        self._lines[rows[changed]] = staying[changed]
        return pb.ProgramCall(
            kind=call.kind,
            rows=call.bucket[0],
            tokens=call.bucket[1],
            heads=np.column_stack([rows, buffer[:, _HEAD]]).astype(_INT32).tobytes(),
            changed=changed.tobytes(),
            changed_columns=staying[changed].astype(_INT32).tobytes(),
            prompt_tokens=buffer[:, shape.line_columns :].astype(_INT32).tobytes(),
        )

    def decode(self, plan: pb.StepPlan) -> StepInputs:
        """Reads a step back, and remembers what it says of each row.

        Raises:
            ValueError: sizes that do not fit the compiled shapes.
        """
        vocab = self._shape.vocab_size
        setups = [
            RowSetup(
                setup.row,
                _array(setup.counts, _INT32, (vocab,)),
                _array(setup.bias, _FLOAT32, (vocab,)),
            )
            for setup in plan.setups
        ]
        calls = [self._decode_call(call) for call in plan.calls]
        rows: list[int] = _array(plan.mask_rows, _INT32, (-1,)).tolist()
        words = _array(plan.mask_words, _INT32, (len(rows), mask_words(vocab)))
        return StepInputs(calls, setups, 0, 0, MaskUpdate(rows, words) if rows else None)

    def _decode_call(self, call: pb.ProgramCall) -> ProgramCall:
        shape = self._shape
        first = shape.line_columns
        count = shape.data_shards * call.rows
        bucket = (call.rows, call.tokens)
        extra = 0 if call.kind == "decode" else prompt_columns(bucket)
        heads = _array(call.heads, _INT32, (count, 1 + len(_HEAD)))
        rows = heads[:, 0]
        changed = _array(call.changed, _INT32, (-1,))
        columns = (len(changed), first - _STAYING)
        self._lines[rows[changed]] = _array(call.changed_columns, _INT32, columns)
        buffer = np.empty((count, first + extra), np.int32)
        buffer[:, Column.ROW] = rows - self._first_rows(call.rows)
        buffer[:, _HEAD] = heads[:, 1:]
        buffer[:, _STAYING:first] = self._lines[rows]
        buffer[:, first:] = _array(call.prompt_tokens, _INT32, (count, extra))
        return ProgramCall(call.kind, bucket, buffer)

    def _first_rows(self, rows: int) -> np.ndarray:
        """For each line of a buffer, the first row of its data shard."""
        shards = np.arange(self._shape.data_shards, dtype=np.int32)
        return np.repeat(shards * self._shape.shard_rows, rows)


def digest_of(result: StepResult) -> bytes:
    """Of the newest token of every row."""
    tokens = np.ascontiguousarray(result.rows[:, 0])
    return hashlib.blake2b(tokens.tobytes(), digest_size=DIGEST_BYTES).digest()


# -- host 0 ----------------------------------------------------------------------------------------


class LeaderRunner:
    """A ``Runner`` whose steps every host executes."""

    def __init__(self, runner: Runner, group: Group, shape: StepShape) -> None:
        """Takes the group over: from here on its messages are digests."""
        self._runner = runner
        self._group = group
        self._mirror = LineMirror(shape)
        self._sequence = 0
        # Both may stand still with the device when a host is gone; the engine's thread may not.
        self._dispatcher = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-dispatch")
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-result")
        self._lost: Future[None] = Future()
        self._lock = threading.Lock()
        self._digests: OrderedDict[int, bytes] = OrderedDict()
        """This host's, of the last ``MAX_STEPS_APART`` steps."""
        self._theirs: dict[int, dict[int, bytes]] = {}
        """Digests that came before this host's own, by step and host."""
        self._reported = dict.fromkeys((member.host_id for member in group.others), 0)
        """The last step that each follower has executed."""
        group.on_step = self._take

    def watch_group(self, fail: Callable[[Exception], None]) -> None:
        """Has ``fail`` called when a host is lost, and whoever waits for a step wakened."""

        def lose(error: GroupError) -> None:
            fatal = FatalStepError(str(error))
            with suppress(InvalidStateError):  # Somebody else has told it.
                self._lost.set_exception(fatal)
            fail(fatal)

        self._group.tell(lose)

    def dispatch(self, inputs: StepInputs) -> StepHandle:
        """Sends a step to every host and starts it here.

        Raises:
            FatalStepError: a host is gone; the group ends.
        """
        self._sequence += 1
        try:
            plan = self._mirror.encode(inputs, self._sequence)
            self._group.broadcast(pb.Envelope(step_plan=plan))
        except Exception as error:
            raise self._fatal(error) from error
        dispatched = self._dispatcher.submit(self._runner.dispatch, inputs)
        result = self._waiter.submit(lambda: dispatched.result().wait())
        return _GroupHandle(self, result, self._sequence)

    def reset(self) -> None:
        """A group does not go on after a failed step."""
        raise FatalStepError("a step failed on a mesh of several hosts; the group ends")

    @property
    def compiles_after_ready(self) -> int:
        """Of this host."""
        return self._runner.compiles_after_ready

    def result_of(self, future: Future[StepResult], sequence: int) -> StepResult:
        """Waits for a step of this host; raises FatalStepError when a host is lost meanwhile."""
        either: list[Future[Any]] = [future, self._lost]
        wait(either, return_when=FIRST_COMPLETED)
        try:
            result = future.result(timeout=0)
        except Exception as error:
            raise self._fatal(error) from error
        self._own(sequence, digest_of(result))
        return result

    def _fatal(self, error: Exception) -> FatalStepError:
        """The error that ends the group, with the host that caused it where that can be known."""
        wait((self._lost,), timeout=CAUSE_PATIENCE_S)
        cause = self._lost.exception() if self._lost.done() else None
        if isinstance(cause, FatalStepError):
            return cause
        return FatalStepError(f"a step failed on host 0: {error}")

    def _own(self, sequence: int, digest: bytes) -> None:
        with self._lock:
            self._digests[sequence] = digest
            while len(self._digests) > MAX_STEPS_APART:
                self._digests.popitem(last=False)
            early = self._theirs.pop(sequence, {})
        for host_id, theirs in early.items():
            self._check(host_id, sequence, theirs, digest)

    def _take(self, member: Member, message: pb.Envelope) -> None:
        if message.WhichOneof("body") != "step_done":
            raise GroupError("it sends steps, which only host 0 may")
        done = message.step_done
        expected = self._reported[member.host_id] + 1
        if done.sequence != expected:
            raise GroupError(f"it reports step {done.sequence} where {expected} was due")
        self._reported[member.host_id] = done.sequence
        with self._lock:
            own = self._digests.get(done.sequence)
            oldest = next(iter(self._digests), 0)
            if own is None and done.sequence < oldest:
                raise GroupError(f"it is more than {MAX_STEPS_APART} steps behind host 0")
            if own is None:
                self._theirs.setdefault(done.sequence, {})[member.host_id] = done.digest
        if own is not None:
            self._check(member.host_id, done.sequence, done.digest, own)

    def _check(self, host_id: int, sequence: int, theirs: bytes, own: bytes) -> None:
        if theirs != own:
            member = next(other for other in self._group.others if other.host_id == host_id)
            self._group.fail(
                GroupError(f"{member} sampled other tokens than host 0 in step {sequence}")
            )


class _GroupHandle:
    """A step under way on every host."""

    def __init__(self, leader: LeaderRunner, future: Future[StepResult], sequence: int) -> None:
        self._leader = leader
        self._future = future
        self._sequence = sequence

    def wait(self) -> StepResult:
        """Blocks until the step has run here, or cannot any more."""
        return self._leader.result_of(self._future, self._sequence)


# -- every other host ------------------------------------------------------------------------------


def follow_steps(
    runner: Runner,
    group: Group,
    shape: StepShape,
    *,
    on_ready: Callable[[], None],
    on_lost: Callable[[GroupError], None] = lambda error: None,
) -> None:
    """Executes the steps of host 0 until it stops.

    Args:
        runner: ready, with the same programs and weights as on host 0.
        group: joined.
        shape: the compiled shapes.
        on_ready: called when steps can be taken, right before host 0 hears of it.
        on_lost: called on another thread when host 0 is lost. The device runtime aborts this
            process within a few milliseconds of that, so whatever is to be said is said here.

    Raises:
        GroupError: host 0 was lost, a step failed here, or steps came out of order.
    """
    (leader,) = group.others
    plans: queue.SimpleQueue[pb.StepPlan | GroupError] = queue.SimpleQueue()
    mirror = LineMirror(shape)
    expected = 1
    lost = threading.Event()

    def lose(error: GroupError) -> None:
        if not isinstance(error, GroupGoodbye):
            on_lost(error)
        plans.put(error)
        lost.set()

    group.on_step = lambda member, message: plans.put(message.step_plan)
    group.tell(lose)
    reports = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-report")

    def failed(sequence: int, error: Exception) -> GroupError:
        lost.wait(CAUSE_PATIENCE_S)
        if group.failure is not None:
            return group.failure
        return GroupError(f"step {sequence} failed on host {group.config.host_id}: {error}")

    def report(handle: StepHandle, sequence: int) -> None:
        try:
            done = pb.StepDone(sequence=sequence, digest=digest_of(handle.wait()))
            leader.link.send(pb.Envelope(step_done=done))
        except Exception as error:
            plans.put(failed(sequence, error))

    on_ready()
    while True:
        plan = plans.get()
        if isinstance(plan, GroupGoodbye):
            return
        if isinstance(plan, GroupError):
            raise plan
        if plan.sequence != expected:
            raise GroupError(f"step {plan.sequence} came from host 0 where {expected} was due")
        expected += 1
        try:
            handle = runner.dispatch(mirror.decode(plan))
        except Exception as error:
            raise failed(plan.sequence, error) from error
        reports.submit(report, handle, plan.sequence)


def _array(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape)
