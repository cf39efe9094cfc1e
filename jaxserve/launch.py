"""The composition root: builds every part in order and tears it down in reverse.

    1 resolve    ServeConfig + the model's config + the visible devices -> LaunchPlan
      text       beside all that follows: the tokenizer, the process of the chat template
    2 programs   the largest first, loaded or compiled: XLA says what they need beside arguments
    3 pages      plan_memory; the count of the last launch is taken again while it fits
    4 the rest   other programs, in parallel, small ones first, while weights stream in and the
                 device state is allocated; 2 and 3 are in ``sizing.py``
    5 ready      what has to be run once is run; after this no request waits for XLA
    6 beside     for a server, memory and a step are measured beside what was planned
    7 engine     the loop thread starts
    8 late       programs that are not needed to begin with are made beside serving (``late.py``)

The server and its port come after that, in ``frontend/grpc``; ``serve`` ties both together.
Nothing else in the package constructs long-lived objects.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jaxserve.config import PROMPT_LINES, GroupConfig, ServeConfig
from jaxserve.engine.engine import Engine, EngineLimits
from jaxserve.engine.engine import Runner as StepRunner
from jaxserve.engine.plan import SchedulerConfig
from jaxserve.engine.step import MAX_END_TOKENS, StepShape
from jaxserve.errors import ConfigError, GroupError, TokenizerError
from jaxserve.frontend.byte_tokenizer import byte_tokenizer
from jaxserve.frontend.generation import TextEngine
from jaxserve.frontend.grammar_compiler import GrammarCompiler
from jaxserve.frontend.model_info import ModelInfo
from jaxserve.frontend.parsing import choose_format
from jaxserve.frontend.template import ChatTemplate
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.late import LatePrograms
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Params
from jaxserve.planning.beside import Beside, Expected, compare, expect
from jaxserve.planning.devices import facts_of_kind
from jaxserve.resolve import (
    LaunchPlan,
    configure_jax,
    is_ready_with_first,
    overlaps_steps,
    resolve,
    sharding_summary,
)
from jaxserve.runner.compiling import CompileCounter
from jaxserve.runner.followers import LeaderRunner, follow_steps
from jaxserve.runner.group import Group
from jaxserve.runner.measure import MemoryMeter
from jaxserve.runner.preflight import HostFacts, join, lead
from jaxserve.runner.runner import Runner
from jaxserve.sizing import (
    Report,
    compile_wanted,
    free_bytes,
    make_model,
    silent,
    size_pool,
)
from jaxserve.version import __version__
from jaxserve.weights.saved import save_model
from jaxserve.weights.source import ModelSource, open_source
from pallas_kernels import native
from sharding.multihost import every_host_caches, join_runtime

logger = logging.getLogger(__name__)

SHARED_FLAGS = (
    "mesh",
    "device",
    "dtype",
    "quantization",
    "kv_dtype",
    "kernels",
    "load_format",
    "seed",
    "context_tokens",
    "max_rows",
    "step_tokens",
    "page_tokens",
    "kv_memory_fraction",
    "kv_memory_bytes",
    "prompt_logprobs",
    "embeddings",
)
"""Fields of ``ServeConfig`` that have to be the same on every host of a mesh."""

OnLost = Callable[[GroupError], None]


@dataclass(eq=False)
class Service:
    """A running engine with everything that a front end needs. Close it to get memory back."""

    config: ServeConfig
    plan: LaunchPlan
    engine: Engine
    runner: Runner
    text: TextEngine
    info: ModelInfo
    source: ModelSource
    ready_seconds: float
    """From the call of ``build`` until the first request could be taken."""
    group: Group | None = None
    """The other hosts of the mesh, if there are any."""
    beside: Beside | None = None
    """What was predicted of this launch, and what was measured, if ``build`` was asked to."""
    late: LatePrograms | None = None
    """Makes the programs that it was ready without; None when all were there."""

    def save(self, path: Path) -> None:
        """Writes the weights, as they are served, for a faster start from ``MODEL = path``.

        Raises:
            CheckpointError: the path exists or cannot be written.
        """
        save_model(path, self.runner.model, self.runner.stored_params(), self.source)

    def close(self) -> None:
        """Stops the engine, and the other hosts, and drops every array. Safe to call again."""
        if self.late is not None:
            self.late.cancel()
        self.engine.stop()
        if self.late is not None:
            self.late.close()
        if self.group is not None:
            self.group.close()
        self.runner.close()
        self.source.close()
        if self.text.template is not None:
            self.text.template.close()
        if self.text.grammars is not None:
            self.text.grammars.close()

    def __enter__(self) -> Service:
        """The block's value is the service itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes, whatever happened in the block."""
        self.close()


def build(
    config: ServeConfig,
    report: Report = silent,
    *,
    hosts: GroupConfig | None = None,
    on_lost: OnLost = lambda error: None,
    measure: bool = False,
    eager_grammars: bool = False,
) -> Service:
    """Builds a ready service, on host 0 of the mesh.

    Args:
        config: what to build.
        report: hears of the progress.
        hosts: the hosts of the mesh, when there are several.
        on_lost: called when one of them is lost before all are ready, on another thread. This one
            may be waiting for that host where nothing can interrupt it, so the process should end.
        measure: also predicts and measures memory and a step, in half a second; see ``beside``.
        eager_grammars: reads the vocabulary for grammars beside the weights. The first grammar does
            it otherwise, which holds up every other request by up to a second.

    Raises:
        LaunchError: a flag, a file or the machine has to change; the message says which and how.
    """
    start = time.perf_counter()
    # The thread has ended when ``undo`` closes what it made.
    with ExitStack() as undo, ThreadPoolExecutor(1, thread_name_prefix="jaxserve-text") as pool:
        source, group = _begin(config, hosts, on_lost, undo)
        text = pool.submit(_text_parts, config, source, undo)
        plan = resolve(config, source.model_config(), source.formats)
        making = pool.submit(_grammars, text, plan.model.vocab_size, eager_grammars, undo)
        free, meter = free_bytes(plan), MemoryMeter()
        expected: list[Expected] = []
        facts = facts_of_kind(plan.mesh.devices.flat[0].device_kind)

        def predict(runner: Runner) -> None:
            if measure and facts is not None:
                expected.append(
                    expect(plan.name, plan.model, plan, facts, free_bytes=free, runner=runner)
                )

        runner, digest = _make_ready(config, plan, source, group, report, undo, text, predict)
        (tokenizer, template), grammars = text.result(), making.result()
        steps: StepRunner = runner
        if group is not None:
            group.ready(digest)
            steps = LeaderRunner(runner, group, plan.step)
        num_pages, shape = runner.config.cache.num_pages, runner.loaded_shape
        end_ids = _end_ids(plan.model, tokenizer)
        engine = _make_engine(config, plan, steps, num_pages, shape, end_ids)
        if isinstance(steps, LeaderRunner):
            steps.watch_group(engine.fail)
        info = _model_info(plan, engine, tokenizer, digest, config)
        beside = None
        if expected:
            beside = compare(expected[0], meter=meter, runner=runner, steps=steps)
        undo.pop_all()  # From here on the service closes them.
    engine.start()
    late = LatePrograms(config, runner, engine) if runner.missing_keys() else None
    if late is not None:
        late.start()
    ready_seconds = time.perf_counter() - start
    report("ready", 1, 1, f"{ready_seconds:.1f} s")
    answer_format = choose_format(template.text if template else None, plan.name)
    text_engine = TextEngine(engine, tokenizer, template, grammars, answer_format)
    return Service(
        config, plan, engine, runner, text_engine, info, source, ready_seconds, group, beside, late
    )


def follow(
    config: ServeConfig,
    hosts: GroupConfig,
    report: Report = silent,
    *,
    on_ready: Callable[[float], None],
    on_lost: OnLost = lambda error: None,
) -> None:
    """Executes the steps of host 0 on this host until host 0 stops.

    Args:
        config: the same as on host 0.
        hosts: the hosts of the mesh.
        report: hears of the progress.
        on_ready: called with the seconds that it took, once steps can be taken.
        on_lost: called when host 0 is lost, at any time, on another thread. This one may wait for
            it where nothing can interrupt it, so the process should end.

    Raises:
        LaunchError: a flag, a file or the machine has to change, or the group has failed.
    """
    start = time.perf_counter()
    with ExitStack() as undo:
        source, group = _begin(config, hosts, on_lost, undo)
        assert group is not None
        plan = resolve(config, source.model_config(), source.formats)
        runner, digest = _make_ready(config, plan, source, group, report, undo)

        def ready() -> None:
            on_ready(time.perf_counter() - start)
            group.ready(digest)

        def lost(error: GroupError) -> None:
            group.close(str(error))
            on_lost(error)

        try:
            follow_steps(runner, group, plan.step, on_ready=ready, on_lost=lost)
        except GroupError as error:
            group.close(str(error))
            raise


def open_configured(config: ServeConfig) -> ModelSource:
    """Opens the model that a config names.

    Raises:
        CheckpointError: it is not there, cannot be fetched, or is damaged.
    """
    return open_source(
        config.model,
        assets_dir=config.assets_dir,
        offline=config.offline,
        random_weights=config.load_format == "dummy",
        seed=config.seed,
    )


# -- the parts, in the order of ``build`` ----------------------------------------------------------


def _begin(
    config: ServeConfig, hosts: GroupConfig | None, on_lost: OnLost, undo: ExitStack
) -> tuple[ModelSource, Group | None]:
    """Opens the model and gathers the hosts, before devices are looked at."""
    if config.executables is not None and hosts is not None and hosts.hosts > 1:
        raise ConfigError(
            "--executables is for one host and --hosts is "
            f"{hosts.hosts}; leave it out: every host keeps what it compiles in its --cache-dir"
        )
    if config.ready_with == "first" and hosts is not None and hosts.hosts > 1:
        raise ConfigError(
            f"--ready-with first is for one host and --hosts is {hosts.hosts}, which must all have "
            "the programs of a step; leave it out"
        )
    configure_jax(config)
    # Compiling is what a launch is for, also while another service of this process is strict.
    CompileCounter.instance().strict = False
    source = open_configured(config)
    undo.callback(source.close)
    if hosts is None or hosts.hosts == 1:
        return source, None
    this_host = HostFacts.of_this_host(_host_facts(config, hosts, source.model_config()))
    group = (lead if hosts.host_id == 0 else join)(hosts, this_host, logger.warning)

    def part(kind: object, error: BaseException | None, trace: object) -> None:
        group.close(f"host {hosts.host_id} did not start: {error}" if error else "")

    undo.push(part)
    group.tell(on_lost)
    try:
        join_runtime(
            runtime_address=group.runtime_address,
            hosts=hosts.hosts,
            host_id=hosts.host_id,
            own_address=group.address,
            timeout_s=hosts.join_timeout_s,
        )
    except RuntimeError as error:
        raise GroupError(f"the device runtime does not start: {error}") from error
    return source, group


def _host_facts(config: ServeConfig, hosts: GroupConfig, model: ModelConfig) -> dict[str, str]:
    """What has to be the same on every host before programs and pools can be."""
    model_facts = json.dumps(asdict(model), sort_keys=True)
    return {
        "jaxserve": __version__,
        "jax": jax.__version__,
        "--hosts": str(hosts.hosts),
        "model config": hashlib.sha256(model_facts.encode()).hexdigest()[:12],
        "CPU with AMX": str(native.has_amx()),
        "native kernels": native.build_name(),
        **{f"--{name.replace('_', '-')}": str(getattr(config, name)) for name in SHARED_FLAGS},
    }


def _make_ready(
    config: ServeConfig,
    plan: LaunchPlan,
    source: ModelSource,
    group: Group | None,
    report: Report,
    undo: ExitStack,
    text: Future[Any] | None = None,
    meanwhile: Callable[[Runner], None] = lambda runner: None,
) -> tuple[Runner, str]:
    """Compiles, loads and warms up; returns the runner and the model's digest.

    What goes wrong with ``text`` is heard of early. ``meanwhile`` is called when there are
    programs, while weights still stream in.
    """
    if plan.platform == "cpu" and (reason := native.why_not()):
        logger.warning(
            "%s; attention runs in plain XLA, a decode step's 2 to 5 times slower", reason
        )
    caching = nullcontext() if group is None else every_host_caches()
    with caching, ThreadPoolExecutor(3, thread_name_prefix="jaxserve-load") as pool:
        digest = pool.submit(source.digest)
        runner, params = _prepare(config, plan, source, group, pool, report, undo, text, meanwhile)
        runner.make_ready(params, strict=config.strict_compile)
        return runner, digest.result()


def _text_parts(
    config: ServeConfig, model: ModelSource, undo: ExitStack
) -> tuple[Tokenizer, ChatTemplate | None]:
    """Reads the tokenizer and starts the process of the chat template."""
    files = model.tokenizer()
    tokenizer = byte_tokenizer() if files is None else load_tokenizer(files)
    source, template = tokenizer.source, tokenizer.chat_template
    if config.chat_template is not None:
        source = str(config.chat_template)
        try:
            template = config.chat_template.read_text()
        except OSError as error:
            raise TokenizerError(f"cannot read --chat-template {source}: {error}") from error
    if template is None:
        return tokenizer, None
    made = ChatTemplate(template, source=source, special_texts=tokenizer.special_texts)
    undo.callback(made.close)
    return tokenizer, made


def _grammars(
    text: Future[tuple[Tokenizer, ChatTemplate | None]],
    vocab_size: int,
    eager: bool,
    undo: ExitStack,
) -> GrammarCompiler:
    """Makes what compiles grammars, behind the tokenizer."""
    tokenizer, _ = text.result()
    made = GrammarCompiler(tokenizer, vocab_size=vocab_size, eager=eager)
    undo.callback(made.close)
    return made


def _prepare(
    config: ServeConfig,
    plan: LaunchPlan,
    source: ModelSource,
    group: Group | None,
    pool: ThreadPoolExecutor,
    report: Report,
    undo: ExitStack,
    text: Future[Any] | None,
    meanwhile: Callable[[Runner], None],
) -> tuple[Runner, Params]:
    """Loads or compiles everything while the weights stream in and the pages are allocated."""
    model = make_model(plan)
    wanted = Runner.first_keys if is_ready_with_first(config, plan) else Runner.program_keys
    runner = size_pool(config, plan, model, group, report, wanted)
    undo.callback(runner.close)
    loading: Future[Params] = pool.submit(
        source.load,
        model,
        dtype=plan.dtype,
        shardings=runner.param_shardings,
        progress=lambda done, total: report("weights", done, total, source.name),
    )
    allocating = pool.submit(runner.allocate)

    def check() -> None:
        for beside in (loading, text):
            if beside is not None and beside.done():
                beside.result()  # A bad weight is heard of now, not when everything is compiled.

    compile_wanted(config, runner, report, wanted, meanwhile=check)
    meanwhile(runner)
    allocating.result()
    return runner, loading.result()


def _make_engine(
    config: ServeConfig,
    plan: LaunchPlan,
    runner: StepRunner,
    num_pages: int,
    shape: StepShape,
    end_ids: tuple[int, ...],
) -> Engine:
    longest = max(tokens for _, tokens in plan.step.prefill_buckets)
    scheduler = SchedulerConfig(
        max_rows=plan.step.max_rows,
        # Decode rows have a program of their own: they take no places from the prompt's bucket.
        step_tokens=longest + plan.step.max_rows,
        chunk_tokens=longest,
        max_chunks=PROMPT_LINES,
        page_tokens=plan.page_tokens,
        num_pages=num_pages,
        data_shards=plan.step.data_shards,
        prefix_cache=config.prefix_cache,
    )
    limits = EngineLimits(
        context_tokens=min(plan.context_tokens, (num_pages - 1) * plan.page_tokens),
        vocab_size=plan.model.vocab_size,
        max_waiting_requests=config.max_waiting_requests,
        max_waiting_tokens=config.max_waiting_tokens,
        watchdog_s=config.watchdog_s,
        prompt_logprobs=config.prompt_logprobs,
        embeddings=config.embeddings,
    )
    return Engine(
        runner,
        scheduler=scheduler,
        shape=shape,
        limits=limits,
        end_ids=end_ids,
        overlap=overlaps_steps(config, plan),
    )


def _model_info(
    plan: LaunchPlan, engine: Engine, tokenizer: Tokenizer, digest: str, config: ServeConfig
) -> ModelInfo:
    return ModelInfo(
        name=plan.name,
        model_digest=digest,
        architecture=plan.model.architecture,
        context_tokens=engine.limits.context_tokens,
        vocab_size=plan.model.vocab_size,
        dtype=plan.dtype.name,
        kv_dtype=plan.kv_name,
        quantization=plan.quantization,
        parameters=plan.model.params,
        mesh=",".join(f"{name}={size}" for name, size in plan.mesh.shape.items()),
        sharding_summary=sharding_summary(plan),
        max_rows=plan.step.max_rows * plan.step.data_shards,
        pages_total=engine.stats().pages_total,
        page_tokens=plan.page_tokens,
        eos_token_ids=_end_ids(plan.model, tokenizer),
        has_chat_template=tokenizer.chat_template is not None or config.chat_template is not None,
        has_prompt_logprobs=config.prompt_logprobs,
        has_embeddings=config.embeddings,
        platform=plan.platform,
        server_version=__version__,
    )


# -- small decisions -------------------------------------------------------------------------------


def _end_ids(model: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's end tokens, which the front end goes by too, that the model can choose."""
    ids = tuple(sorted(number for number in tokenizer.eos_ids if number < model.vocab_size))
    if len(ids) > MAX_END_TOKENS:
        raise TokenizerError(
            f"{tokenizer.source} names {len(ids)} end tokens and {MAX_END_TOKENS} are supported; "
            "shorten eos_token_id in its generation_config.json"
        )
    return ids
