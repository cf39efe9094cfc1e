"""Predict memory and speed of a launch, without its devices and without its weights.

Exit status: 0 it fits, 1 it does not, 2 a flag or the model has to change.
"""

from __future__ import annotations

import argparse
import json
import os

from jaxserve.cli import flags
from jaxserve.cli.environment import Environment
from jaxserve.cli.launch import config_defaults
from jaxserve.cli.models import ensure_asset
from jaxserve.cli.plan_table import describe
from jaxserve.config import ServeConfig
from jaxserve.errors import MeshError
from jaxserve.planning.devices import device_facts, device_names
from jaxserve.planning.traffic import OUTPUT_TOKENS, PROMPT_TOKENS, typical
from jaxserve.progress import show_progress

SUMMARY = "predict memory and speed of a launch"
USAGE = "MODEL [FLAGS]"
EXAMPLES = """\
  jaxserve plan dummy:llama-3.3-70b --device h200 --mesh 1x4
  jaxserve plan owner/name --device l40s --context-tokens 8192 --prompt-tokens 2000
  jaxserve plan smollm2 --device cpu --json
"""
MACHINE_FLAGS = [name for name in flags.MACHINE_FLAGS if name != "device"]
"""Of launch; a plan's device need not be there."""
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
    machine = flags.add_fields(parser, "machine", ServeConfig, MACHINE_FLAGS)
    flags.add_tensor_alias(machine)
    flags.add_fields(parser, "steps and memory", ServeConfig, MEMORY_FLAGS)
    flags.add_fields(parser, "places", ServeConfig, ("offline", *flags.PLACE_FLAGS), defaults)


def run(options: argparse.Namespace, environment: Environment) -> int:
    """Prints the plan; 0 when it fits and 1 when it does not."""
    facts = device_facts(options.device)
    config = ServeConfig(**flags.field_values(options, ServeConfig))
    with show_progress() as progress:
        ensure_asset(config, progress)
    # After what can be refused at once: this imports jax. Its compiler for GPUs remarks on all that
    # it cannot tune without one.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    from jaxserve.planning import aot
    from jaxserve.planning.plan import predict
    from jaxserve.resolve import configure_jax, resolve, resolve_quantization, resolve_sizes
    from jaxserve.weights.source import read_model_facts
    from sharding.mesh import MeshShapeError, parse_mesh

    # A GPU of this machine may be serving: it is not touched, whatever is planned.
    jax.config.update("jax_platforms", "cpu")
    try:
        shape = parse_mesh(config.mesh)
    except MeshShapeError as error:
        raise MeshError(f"--mesh {config.mesh}: {error}") from error
    quantization = resolve_quantization(config, facts.platform)
    where = {"assets_dir": config.assets_dir, "offline": config.offline}
    model, formats = read_model_facts(config.model, quantization, **where)
    shards = {"data_shards": shape.data, "tensor": shape.tensor}
    asked = (config, model, facts.platform)
    sizes = resolve_sizes(*asked, kind=facts.kind, formats=formats, **shards)
    traffic = typical(options.prompt_tokens, options.output_tokens, sizes.context_tokens)
    compile_on = why_estimated = None
    if facts.simulated:
        configure_jax(config)
        compile_on = resolve(config, model).mesh
    elif (why_estimated := aot.why_not(facts, shape)) is None:
        compile_on = aot.absent_mesh(facts, shape)
    prediction = predict(config.model, model, shape, facts, sizes, traffic, compile_on=compile_on)
    if options.json:
        print(json.dumps(prediction.as_json(), indent=2))
    else:
        print(describe(prediction, why_estimated=why_estimated))
    return 0 if prediction.fits else 1
