"""Predict memory and speed of a launch, without its devices and without its weights.

Exit status: 0 it fits, 1 it does not, 2 a flag or the model has to change.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from jaxserve.cli import flags
from jaxserve.cli.environment import Environment
from jaxserve.cli.launch import config_defaults
from jaxserve.cli.models import ensure_asset
from jaxserve.config import ServeConfig
from jaxserve.errors import MeshError
from jaxserve.planning.devices import device_facts, device_names
from jaxserve.planning.traffic import OUTPUT_TOKENS, PROMPT_TOKENS, typical
from jaxserve.progress import show_progress

if TYPE_CHECKING:
    from jaxserve.planning.plan import Prediction

SUMMARY = "predict memory and speed of a launch"
USAGE = "MODEL [FLAGS]"
EXAMPLES = """\
  jaxserve plan dummy:llama-3.3-70b --device h200 --mesh 1x4
  jaxserve plan owner/name --device l40s --context-tokens 8192 --prompt-tokens 2000
  jaxserve plan smollm2 --device cpu --json
"""
MEMORY_FLAGS = [name for name in flags.MEMORY_FLAGS if name != "prefix_cache"]
"""Of launch; sharing pages changes no size."""


def add_flags(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Adds the model, the device, a typical sequence, and what launch takes for its sizes."""
    defaults = config_defaults(environment)
    parser.add_argument("model", metavar="MODEL", help=flags.field_docs(ServeConfig)["model"])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help=f"{', '.join(device_names())} or cpu:N (N simulated devices) (default: %(default)s)",
    )
    for flag, what, default in (
        ("--prompt-tokens", "prompt", PROMPT_TOKENS),
        ("--output-tokens", "answer", OUTPUT_TOKENS),
    ):
        text = f"of a typical {what} (default: {default}, less in a short context)"
        parser.add_argument(flag, type=int, metavar="N", help=text)
    machine = flags.add_fields(parser, "machine", ServeConfig, ("mesh", "dtype", "kv_dtype"))
    flags.add_tensor_alias(machine)
    flags.add_fields(parser, "steps and memory", ServeConfig, MEMORY_FLAGS)
    flags.add_fields(parser, "places", ServeConfig, ("offline", *flags.PLACE_FLAGS), defaults)


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Prints the plan; 0 when it fits and 1 when it does not."""
    facts = device_facts(options.device)
    config = ServeConfig(**flags.field_values(options, ServeConfig))
    with show_progress() as progress:
        ensure_asset(config, progress)
    # After what can be refused at once: this imports jax.
    import jax

    from jaxserve.planning.plan import predict
    from jaxserve.resolve import configure_jax, resolve, resolve_sizes
    from jaxserve.weights.source import read_model_config
    from sharding.mesh import MeshShapeError, parse_mesh

    # A GPU of this machine may be serving: it is not touched, whatever is planned.
    jax.config.update("jax_platforms", "cpu")
    try:
        shape = parse_mesh(config.mesh)
    except MeshShapeError as error:
        raise MeshError(f"--mesh {config.mesh}: {error}") from error
    model = read_model_config(config.model, assets_dir=config.assets_dir, offline=config.offline)
    sizes = resolve_sizes(config, model, facts.platform, data_shards=shape.data)
    traffic = typical(options.prompt_tokens, options.output_tokens, sizes.context_tokens)
    compile_on = None
    if facts.simulated:
        configure_jax(config)
        compile_on = resolve(config, model).mesh
    prediction = predict(config.model, model, shape, facts, sizes, traffic, compile_on=compile_on)
    if options.json:
        print(json.dumps(prediction.as_json(), indent=2))
    else:
        print(describe(prediction))
    return 0 if prediction.fits else 1


def describe(plan: Prediction) -> str:
    """Returns the plan as a table for people."""
    lines = [f"{plan.model} on {plan.mesh} {plan.device}: {_verdict(plan)}"]
    rows = _memory_rows(plan) + _step_rows(plan)
    lines += [f"  {name:22} {value:>12}  {remark}".rstrip() for name, value, remark in rows]
    lines += [f"  note: {note}" for note in plan.details.notes]
    lines.append(f"  device facts: {plan.details.source}")
    lines.append("predicted, not measured; docs/planning.md says what is exact")
    return "\n".join(lines)


def _verdict(plan: Prediction) -> str:
    if plan.fits:
        return "fits"
    nearest = plan.nearest_fit
    hint = "no mesh of up to 64 devices does" if nearest is None else f"the nearest is {nearest}"
    return f"does not fit; {hint}\n  {plan.details.memory.refusal}"


def _memory_rows(plan: Prediction) -> list[tuple[str, str, str]]:
    sizes, traffic = plan.details.sizes, plan.details.traffic
    budget, pages = plan.details.memory.budget, plan.pages_per_data_shard
    return [
        ("parameters", f"{plan.params / 1e6:,.1f} M", ""),
        ("memory per device", _mb(budget.free_bytes), "free before weights"),
        ("  weights", _mb(plan.weight_bytes_per_device), sizes.dtype.name),
        ("  row state", _mb(budget.row_state_bytes), ""),
        ("  temporaries", _mb(plan.temp_bytes_per_device), plan.temp_source),
        (
            "  pages",
            _mb(pages * budget.page_bytes),
            f"{pages:,} of {plan.page_tokens} tokens on each data shard",
        ),
        ("cache per token", f"{plan.kv_bytes_per_token:,} B", sizes.kv_dtype.name),
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
        (
            "first token after",
            _ms(plan.ttft_ms),
            f"of a prompt of {plan.details.traffic.prompt_tokens:,}, alone",
        ),
    ]


def _mb(count: Any) -> str:
    return f"{count / 1e6:,.1f} MB"


def _ms(count: Any) -> str:
    return f"{count:,.3g} ms" if count < 100 else f"{count:,.0f} ms"
