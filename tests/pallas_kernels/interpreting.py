"""Runs GPU kernels on the CPU in JAX's interpreter, looks for races, and plants faults.

The interpreter's state is the process's own: one kernel at a time, and nothing may be compiled for
a GPU with dumps in the same process.
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

KIND = "NVIDIA H200"
BLOCKS = 4
"""Multiprocessors of the interpreted GPU: as few as make a persistent kernel take turns."""
INTERPRETERS = re.compile(r"\b(?:ValueError|IndexError|AssertionError|TimeoutError)\b")
"""Errors by which the interpreter, or ``interpret``'s patience, says what a kernel does wrong."""
_numbers = itertools.count()


class RaceError(AssertionError):
    """The interpreter saw two accesses that nothing orders."""


@contextmanager
def interpreted(*, races: bool = True, blocks: int = BLOCKS) -> Iterator[None]:
    """What is traced in here is for a GPU, and interpreted on the CPU.

    Shared memory and results begin as NaN, or as the largest integer. Reads out of bounds raise.
    """
    device = jax.sharding.AbstractDevice(device_kind=KIND, platform="gpu", num_cores=blocks)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    params = plgpu.InterpretGPUParams(detect_races=races, uninitialized_memory="nan")
    with jax.sharding.use_abstract_mesh(mesh), plgpu.force_gpu_interpret_mode(params):
        yield


def interpret[R](
    function: Callable[..., R], *args: object, blocks: int = BLOCKS, patience_s: float = 120.0
) -> R:
    """Calls a function of arrays, interpreting the GPU kernels in it.

    Args:
        function: Traced as a whole, as in a program.
        *args: Its arguments.
        blocks: Multiprocessors of the GPU.
        patience_s: A kernel that takes longer waits for what never comes, and is made to fail.

    Raises:
        RaceError: There was a race; the interpreter has printed where.
        RuntimeError: No GPU kernel ran.
        Exception: What the interpreter raises: a read out of bounds, a barrier that was left before
            it was observed, a barrier that never completes.
    """
    # A failed kernel leaves its memory behind.
    gpu_callbacks.reset_gpu_interpret_mode_state()
    watch = threading.Timer(patience_s, _give_up, (patience_s,))
    watch.daemon = True
    watch.start()
    try:
        with interpreted(blocks=blocks):
            result = jax.block_until_ready(jax.jit(function)(*args))
    finally:
        watch.cancel()
    state = gpu_callbacks._races
    if state is None:
        raise RuntimeError("no GPU kernel ran: was another implementation chosen?")
    if state.races_found:
        raise RaceError("the interpreter found a race")
    return result


def _give_up(patience_s: float) -> None:
    """Makes the kernel that is being interpreted raise wherever it waits."""
    memory = gpu_callbacks._shared_memory
    if memory is not None:
        error = TimeoutError(f"the kernel did not end within {patience_s:g} s")
        memory.set_failed(error, top_level=False)


class Fault(NamedTuple):
    """One planted fault: a piece of a module's text, and what stands there instead."""

    name: str
    old: str
    new: str
    raises: type[Exception] | None = None
    """By which the fault is caught before anything is interpreted; another error than those of
    ``_outcome`` would be the edit's own, such as a name that is not there."""


def plant(module: ModuleType, fault: Fault) -> ModuleType:
    """Loads a module anew with a fault in it; the module itself stays as it is.

    Args:
        module: Of one file. What it imports is shared with the copy.
        fault: Its old text occurs once.
    """
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    assert text.count(fault.old) == 1, (
        f"{fault.name}: the text occurs {text.count(fault.old)} times"
    )
    copy = ModuleType(f"{module.__name__}_fault_{next(_numbers)}")
    copy.__file__ = module.__file__
    copy.__package__ = module.__package__
    # Dataclasses look their module up.
    sys.modules[copy.__name__] = copy
    exec(compile(text.replace(fault.old, fault.new), module.__file__, "exec"), copy.__dict__)
    return copy


def assert_caught(
    module: ModuleType,
    faults: Sequence[Fault],
    check: Callable[[ModuleType], None],
) -> None:
    """Asserts that a check passes on a module as it is, and on no faulty copy of it.

    Prints how each fault was caught.

    Args:
        module: With the kernel.
        faults: What to plant, one at a time.
        check: Raises when something is wrong: ``interpret`` does for races and misused barriers,
            assertions do for wrong numbers.

    Raises:
        Exception: Something else is wrong with a faulty copy than what a fault does.
    """
    check(module)
    missed = []
    for fault in faults:
        began = time.monotonic()
        try:
            how = _outcome(check, plant(module, fault), fault.raises)
        except Exception as error:
            error.add_note(f"with the fault {fault.name!r}, whose edit may be at fault itself")
            raise
        print(f"{fault.name:40s} {time.monotonic() - began:5.1f} s  {how or 'NOT CAUGHT'}")
        if how is None:
            missed.append(fault.name)
    assert not missed, f"not caught: {', '.join(missed)}"


def _outcome(
    check: Callable[[ModuleType], None], copy: ModuleType, raises: type[Exception] | None
) -> str | None:
    """How a check fails; None where it passes.

    What the interpreter raises comes out of a callback as an error of JAX's, with the text of the
    first. ``ValueError`` is of barriers and copies, ``IndexError`` of places that are not there,
    ``AssertionError`` of negative ones.
    """
    try:
        check(copy)
    except RaceError:
        return "race"
    except AssertionError as wrong:
        return f"wrong numbers: {_first_line(wrong)}"
    except jax.errors.JaxRuntimeError as raised:
        if not INTERPRETERS.search(str(raised)):
            raise
        return _first_line(raised)
    except Exception as raised:
        if raises is None or not isinstance(raised, raises):
            raise
        return f"{type(raised).__name__}: {_first_line(raised)}"
    return None


def _first_line(error: Exception) -> str:
    """The line of a message that says most: the last that names an error, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line and "Traceback" not in line]
    return ((named[-1:] or lines[:1]) or [repr(error)])[0][:110]
