"""A plan as a table for people, alone or beside what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.planning.beside import Beside
    from jaxserve.planning.plan import Prediction
    from jaxserve.planning.sizes import Sizes


def describe(plan: Prediction, *, why_estimated: str | None = None) -> str:
    """Returns the plan as a table for people.

    Args:
        plan: the plan.
        why_estimated: why temporaries are not compiled, if they are not.
    """
    lines = [f"{plan.model} on {plan.mesh} {plan.device}: {_verdict(plan)}"]
    rows = _memory_rows(plan) + _step_rows(plan)
    lines += [f"  {name:22} {value:>12}  {remark}".rstrip() for name, value, remark in rows]
    lines += [f"  note: {note}" for note in plan.details.notes]
    if plan.temp_source == "estimated" and why_estimated is not None:
        lines.append(f"  note: temporaries are a bound: {why_estimated}")
    lines.append(f"  device facts: {plan.details.facts.source}")
    lines.append("predicted, not measured; docs/planning.md says what is exact")
    return "\n".join(lines)


def describe_beside(beside: Beside) -> str:
    """Returns what was predicted of a launch, and what was measured, side by side."""
    plan, held, step = beside.predicted, beside.held, beside.step
    budget = plan.details.memory.budget
    pages = plan.pages_per_data_shard * budget.page_bytes
    predicted = {
        "weights": plan.weight_bytes_per_device,
        "row state": budget.row_state_bytes,
        "pages": pages,
        "temporaries": plan.temp_bytes_per_device,
    }
    measured = {**held.parts, "temporaries": held.temporary_bytes}
    simulated = plan.details.facts.simulated
    whose = "of the whole process, above its start" if simulated else "in use on the device"
    of = f"{step.rows:,} {'row' if step.rows == 1 else 'rows'} of {step.tokens:,} tokens"
    rows = [
        ("", "predicted", "measured", ""),
        ("memory per device", _mb(sum(predicted.values())), _mb(held.total_bytes), ""),
        *((f"  {name}", _mb(size), _mb(measured[name]), "") for name, size in predicted.items()),
        ("peak memory", "", _mb(held.peak_bytes), whose),
        ("decode step", _ms(step.predicted_ms), _ms(step.measured_ms), of),
        ("tokens/s per user", _rate(step.predicted_ms), _rate(step.measured_ms), ""),
        ("first token after", _ms(plan.ttft_ms), "", _prompt(plan)),
        *((name, value, "", remark) for name, value, remark in _sequence_rows(plan)),
    ]
    lines = [
        f"  {name:22} {left:>12} {right:>12}  {remark}".rstrip()
        for name, left, right, remark in rows
    ]
    lines += [f"  note: {note}" for note in plan.details.notes]
    return "\n".join(lines)


def _verdict(plan: Prediction) -> str:
    if plan.fits:
        return "fits"
    nearest = plan.nearest_fit
    hint = "no mesh of up to 64 devices does" if nearest is None else f"the nearest is {nearest}"
    return f"does not fit; {hint}\n  {plan.details.memory.refusal}"


def _memory_rows(plan: Prediction) -> list[tuple[str, str, str]]:
    sizes = plan.details.sizes
    budget, pages = plan.details.memory.budget, plan.pages_per_data_shard
    return [
        ("parameters", f"{plan.params / 1e6:,.1f} M", ""),
        ("memory per device", _mb(budget.free_bytes), "free before weights"),
        ("  weights", _mb(plan.weight_bytes_per_device), _held_as(sizes)),
        ("  row state", _mb(budget.row_state_bytes), ""),
        ("  temporaries", _mb(plan.temp_bytes_per_device), plan.temp_source),
        (
            "  pages",
            _mb(pages * budget.page_bytes),
            f"{pages:,} of {plan.page_tokens} tokens on each data shard",
        ),
        ("cache per token", f"{plan.kv_bytes_per_token:,} B", sizes.kv_name),
        *_token_rows(plan),
        *_sequence_rows(plan),
    ]


def _token_rows(plan: Prediction) -> list[tuple[str, str, str]]:
    """What the pages hold, and what they would in other precisions."""
    shards = plan.details.memory.runner.mesh_shape["data"]
    step, width = plan.details.sizes.step, plan.details.sizes.step.table_width
    most = shards * step.max_rows * width * plan.page_tokens
    chosen = plan.details.sizes.kv_name
    return [
        (
            f"  tokens in {name}",
            f"{tokens:,}",
            ", ".join(
                (["as planned"] if name == chosen else [])
                + ([f"all that {shards * step.max_rows} rows can use"] if tokens == most else [])
            ),
        )
        for name, tokens in plan.kv_tokens.items()
    ]


def _held_as(sizes: Sizes) -> str:
    plain = sizes.dtype.name
    return f"{sizes.quantization}, the rest {plain}" if sizes.formats else plain


def _sequence_rows(plan: Prediction) -> list[tuple[str, str, str]]:
    sizes, traffic = plan.details.sizes, plan.details.traffic
    return [
        (
            "sequences guaranteed",
            f"{plan.sequences_guaranteed:,}",
            f"of full context, {sizes.context_tokens:,} tokens",
        ),
        (
            "sequences expected",
            f"{plan.sequences_expected:,}",
            f"of {traffic.prompt_tokens:,} + {traffic.output_tokens:,} tokens",
        ),
    ]


def _step_rows(plan: Prediction) -> list[tuple[str, str, str]]:
    roofline, wires = plan.details.roofline, plan.collective_bytes
    if roofline is None or wires is None:
        return []
    memory, compute, link = (
        1e3 * seconds for seconds in (roofline.memory_s, roofline.compute_s, roofline.link_s)
    )
    axes = ", ".join(axis for axis, size in wires.items() if size)
    return [
        (
            "step",
            _ms(plan.step_ms),
            f"limited by {plan.limit}: memory {memory:.3g}, compute {compute:.3g}, "
            f"link {link:.3g} ms",
        ),
        ("  read and written", _mb(plan.hbm_bytes_per_step), "per device"),
        ("  computed", f"{(plan.flops_per_step or 0) / 1e9:,.1f} GFLOP", "per device"),
        ("  sent", _mb(sum(wires.values())), f"per device over {axes}" if axes else ""),
        (
            "tokens/s",
            f"{plan.tokens_per_s_per_user:,.1f}",
            f"per user; {plan.tokens_per_s_total:,.0f} in total",
        ),
        ("first token after", _ms(plan.ttft_ms), _prompt(plan)),
    ]


def _prompt(plan: Prediction) -> str:
    return f"of a prompt of {plan.details.traffic.prompt_tokens:,}, alone"


def _rate(step_ms: float) -> str:
    return f"{1e3 / step_ms:,.1f}"


def _mb(count: Any) -> str:
    return f"{count / 1e6:,.1f} MB"


def _ms(count: Any) -> str:
    return f"{count:,.3g} ms" if count < 100 else f"{count:,.0f} ms"
