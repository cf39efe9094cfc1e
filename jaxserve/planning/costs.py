"""Counts what one device computes, exchanges and keeps for a moment, from a traced program.

``count`` and ``peak_bytes`` walk a jaxpr, which needs no device. A loop over layers is multiplied
by its length. Two things are left out, on purpose and in sight:

    cond     the cheapest branch counts: filters, penalties and log-probabilities are not part of
             the base step
    while    not counted but returned in ``Costs.opaque``: attention loops over the pages with a
             trip count that is data; what it costs follows from the context, see ``speed.py``
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

OPAQUE = ("while", "pallas_call", "ffi_call")
"""Loops and kernels whose cost does not stand in the jaxpr."""
NATIVE_PRODUCTS = ("jaxserve_matmul.", "jaxserve_best.", "jaxserve_grouped_matmul.")
"""Kernels with one product of each row, counted as float32; narrow ones are up to four times as
fast on CPUs that have instructions for them."""
NATIVE_FEED_FORWARD = "jaxserve_feed_forward."
"""The one with two."""
NATIVE_ROTATION = "jaxserve_rotate."
"""Of heads of pages of few bits: sums and differences, which are not counted in XLA either."""
IN_PLACE = ("scatter", "scatter-add", "dynamic_update_slice", "reshape", "squeeze", "expand_dims")
"""Their result lies where their first operand did, which the program does not use again."""


@dataclass(frozen=True)
class Costs:
    """Of one device, for one run of a program."""

    flops: Counter[str] = field(default_factory=Counter)
    """Of matrix products, by the dtype of their operands: a multiplication and an addition are 2.
    What is done element by element is not counted."""
    wire_bytes: Counter[str] = field(default_factory=Counter)
    """What a device sends along each mesh axis, when exchanges go around a ring of n: 2 (n-1)/n of
    the array for an all-reduce, n-1 times its own part for an all-gather."""
    exchanges: Counter[str] = field(default_factory=Counter)
    """How many there are along each mesh axis."""
    opaque: int = 0
    """Loops and kernels that were met and are not counted."""

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.flops + other.flops,
            self.wire_bytes + other.wire_bytes,
            self.exchanges + other.exchanges,
            self.opaque + other.opaque,
        )

    def times(self, turns: int) -> Costs:
        """Returns the costs of so many runs."""
        counts = (self.flops, self.wire_bytes, self.exchanges)
        flops, wire_bytes, exchanges = (
            Counter({key: turns * count for key, count in counter.items()}) for counter in counts
        )
        return Costs(flops, wire_bytes, exchanges, turns * self.opaque)


def costs_from(fields: Any) -> Costs | None:
    """Makes costs of their fields, as ``vars`` gives them; None of anything else."""
    try:
        counts = [{**fields[name]} for name in ("flops", "wire_bytes", "exchanges")]
        opaque = fields["opaque"]
    except (KeyError, TypeError):
        return None
    numbers = [opaque, *(number for one in counts for number in one.values())]
    if not all(isinstance(number, (int, float)) for number in numbers):
        return None
    flops, wire_bytes, exchanges = map(Counter[str], counts)
    return Costs(flops, wire_bytes, exchanges, opaque)


def count(jaxpr: Any, axis_sizes: Mapping[str, int]) -> Costs:
    """Adds up what one device does.

    Args:
        jaxpr: of a program or a part of it.
        axis_sizes: of the mesh that its exchanges run over.
    """
    total = Costs()
    for equation in jaxpr.eqns:
        total += _count_one(equation, axis_sizes)
    return total


def _count_one(equation: Any, axis_sizes: Mapping[str, int]) -> Costs:
    name = equation.primitive.name
    if name == "dot_general":
        return Costs(flops=Counter({equation.invars[0].aval.dtype.name: _dot_flops(equation)}))
    if name == "ragged_dot_general":
        # Each row meets the matrix of its group, which is what a good kernel does. XLA has none for
        # CPUs and NVIDIA's GPUs (jaxlib 0.11): it multiplies each row by all, masked.
        x, out = equation.invars[0].aval, equation.outvars[0].aval
        return Costs(flops=Counter({x.dtype.name: 2 * x.size * out.shape[1]}))
    if axes := _mesh_axes(equation, axis_sizes):
        (axis,) = axes
        return Costs(
            wire_bytes=Counter({axis: _wire_bytes(name, equation, axis_sizes[axis])}),
            exchanges=Counter({axis: 1}),
        )
    if name == "ffi_call" and equation.params["target_name"].startswith(NATIVE_PRODUCTS):
        x, stack = equation.invars[0].aval, equation.invars[1].aval
        return Costs(flops=Counter({"float32": 2 * x.size * stack.shape[1]}))
    if name == "ffi_call" and equation.params["target_name"].startswith(NATIVE_FEED_FORWARD):
        x, stack, out = equation.invars[0].aval, equation.invars[1].aval, equation.outvars[0].aval
        products = x.size * stack.shape[1] + out.size * (stack.shape[1] // 2)
        return Costs(flops=Counter({"float32": 2 * products}))
    if name == "ffi_call" and equation.params["target_name"].startswith(NATIVE_ROTATION):
        return Costs()
    if name in OPAQUE:
        # A kernel that only writes into its operands computes nothing, as a scatter does not.
        writes = {result for _, result in equation.params.get("input_output_aliases", ())}
        return Costs(opaque=int(name != "ffi_call" or len(writes) < len(equation.outvars)))
    parts = [count(part, axis_sizes) for part in _parts(equation)]
    if name == "cond":
        return min(parts, key=lambda costs: (costs.flops.total(), costs.wire_bytes.total()))
    return sum(parts, Costs()).times(equation.params["length"] if name == "scan" else 1)


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _mesh_axes(equation: Any, axis_sizes: Mapping[str, int]) -> list[str]:
    """Mesh axes of an exchange; empty for anything else."""
    if equation.primitive.name == "axis_index":
        return []
    named = equation.params.get("axes", equation.params.get("axis_name", ()))
    named = named if isinstance(named, tuple) else (named,)
    return [axis for axis in named if axis in axis_sizes]


def _wire_bytes(name: str, equation: Any, size: int) -> int:
    own = sum(_bytes(variable) for variable in equation.invars)
    if name in ("psum", "psum_invariant", "pmax", "pmin"):
        return 2 * (size - 1) * own // size
    assert name == "all_gather", f"the wire bytes of {name} are not known"
    return (size - 1) * own


def _parts(equation: Any) -> list[Any]:
    """The jaxprs inside an equation."""
    found: list[Any] = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


# -- memory ----------------------------------------------------------------------------------------


def step_body(jaxpr: Any) -> Any:
    """The part of a program that stands inside its ``shard_map``: one device's, with its shapes."""
    (mapped,) = [part for part in jaxpr.eqns if part.primitive.name == "shard_map"]
    (body,) = _parts(mapped)
    return body


def peak_bytes(jaxpr: Any) -> int:
    """Bounds what a program keeps beside its arguments, at the worst moment.

    Every intermediate is an array from where it is computed to where it is used last, as if nothing
    was fused. Arguments, and what is updated in place of them, take nothing; a loop over stacked
    weights takes one copy of a layer. Layouts that a compiler copies for itself are not known here.
    """
    return _Lifetimes(jaxpr).peak()


class _Lifetimes:
    """Which equation makes each array of a jaxpr, and which is the last to use it."""

    def __init__(self, jaxpr: Any) -> None:
        self._jaxpr = jaxpr
        self._root: dict[Any, Any] = {}
        """The variable whose memory another one has; its own when it is not there."""
        self._inner = [[_Lifetimes(part) for part in _parts(eqn)] for eqn in jaxpr.eqns]
        for equation, inner in zip(jaxpr.eqns, self._inner, strict=True):
            for place, source in _shared(equation, inner):
                self._root[equation.outvars[place]] = self._root_of(equation.invars[source])

    def passed_on(self) -> list[tuple[int, int]]:
        """Which results lie where which arguments did."""
        arguments = {variable: place for place, variable in enumerate(self._jaxpr.invars)}
        return [
            (place, arguments[root])
            for place, variable in enumerate(self._jaxpr.outvars)
            if (root := self._root_of(variable)) in arguments
        ]

    def peak(self) -> int:
        last: dict[Any, int] = {}
        for number, equation in enumerate(self._jaxpr.eqns):
            for variable in equation.invars:
                last[self._root_of(variable)] = number
        end = len(self._jaxpr.eqns)
        last |= dict.fromkeys(map(self._root_of, self._jaxpr.outvars), end)
        live: dict[Any, int] = {}
        worst = 0
        for number, (equation, inner) in enumerate(zip(self._jaxpr.eqns, self._inner, strict=True)):
            made = {v: _bytes(v) for v in equation.outvars if v not in self._root}
            within = max((part.peak() for part in inner), default=0) + _sliced_bytes(equation)
            within += _expanded_bytes(equation)
            worst = max(worst, sum(live.values()) + max(sum(made.values()), within))
            live |= made
            live = {v: size for v, size in live.items() if last.get(v, -1) > number}
        return worst

    def _root_of(self, variable: Any) -> Any:
        # A literal has no place in memory, and no hash.
        return None if hasattr(variable, "val") else self._root.get(variable, variable)


def _shared(equation: Any, inner: list[_Lifetimes]) -> list[tuple[int, int]]:
    """Which results of an equation lie where which of its operands did."""
    name = equation.primitive.name
    if name in IN_PLACE:
        return [(0, 0)]
    if name == "ffi_call":
        return [(place, source) for source, place in equation.params["input_output_aliases"]]
    if name == "while":
        constants = len(equation.invars) - len(equation.outvars)
        return [(place, constants + place) for place in range(len(equation.outvars))]
    if name == "scan":
        return _carried(equation)
    if name in ("jit", "shard_map") and inner:
        return inner[0].passed_on()
    return []


def _carried(equation: Any) -> list[tuple[int, int]]:
    """Pairs what a loop hands from turn to turn with where it began, by shape and dtype."""
    stacked = {id(whole) for whole, _ in _stacked(equation)}
    free = [
        (place, variable.aval)
        for place, variable in enumerate(equation.invars)
        if id(variable) not in stacked
    ]
    pairs: list[tuple[int, int]] = []
    (body,) = _parts(equation)
    for place, (variable, turn) in enumerate(zip(equation.outvars, body.outvars, strict=True)):
        if variable.aval.shape != turn.aval.shape:
            continue  # One part for each turn, stacked.
        same = [entry for entry in free if entry[1].shape == variable.aval.shape]
        same = [entry for entry in same if entry[1].dtype == variable.aval.dtype]
        if same:
            free.remove(same[0])
            pairs.append((place, same[0][0]))
    return pairs


def _stacked(equation: Any) -> list[tuple[Any, Any]]:
    """Operands of a loop that it takes apart, each with the part of one turn.

    They are told by their rank: how a scan lists its operands is not a promise of JAX.
    """
    (body,) = _parts(equation)
    pairs = zip(equation.invars, body.invars, strict=True)
    return [(whole, part) for whole, part in pairs if whole.aval.shape != part.aval.shape]


def _sliced_bytes(equation: Any) -> int:
    """What one turn of a loop takes from stacked arrays: a layer's weights."""
    if equation.primitive.name != "scan":
        return 0
    return sum(_bytes(part) for _, part in _stacked(equation))


def _expanded_bytes(equation: Any) -> int:
    """What XLA makes of a ragged product: its rows once for each group, and its matrices transposed
    (compiled for an H200: 281 MB and 805 MB of 512 rows of 2,048 and 128 matrices of 1,536)."""
    if equation.primitive.name != "ragged_dot_general":
        return 0
    rows, matrices = equation.invars[:2]
    return matrices.aval.shape[0] * _bytes(rows) + _bytes(matrices) + _bytes(equation.outvars[0])


def _bytes(variable: Any) -> int:
    aval = variable.aval
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
