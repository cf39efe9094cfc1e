"""Our metrics. ``docs/metrics.md`` has the same table, and a test compares them."""

from __future__ import annotations

import platform
from typing import Literal

from jaxserve.frontend.metrics.family import Family, Labelled, Reading, by, one


def _pages(reading: Reading) -> Labelled:
    for number, shard in enumerate(reading.stats.data_shards):
        yield ("free", str(number)), shard.pages_free
        yield ("used", str(number)), shard.pages_used
        yield ("cached", str(number)), shard.pages_cached


def _rows(reading: Reading) -> Labelled:
    for number, shard in enumerate(reading.stats.data_shards):
        yield (str(number),), shard.rows_running


def _prefix(reading: Reading, what: Literal["lookup", "hit"]) -> int:
    return sum(getattr(shard, f"prefix_{what}_tokens") for shard in reading.stats.data_shards)


def _model(reading: Reading) -> Labelled:
    info = reading.info
    names = (info.name, info.model_digest, info.architecture, info.dtype, info.kv_dtype)
    yield (*names, info.quantization, info.mesh, info.platform), 1


def _build(reading: Reading) -> Labelled:
    yield (reading.info.server_version, platform.python_version()), 1


OWN = (
    Family(
        "jaxserve_requests_accepted_total", "counter", "requests",
        "Requests that were let in.",
        one(lambda r: r.stats.requests_accepted_total),
    ),
    Family(
        "jaxserve_requests_finished_total", "counter", "choices",
        "Choices that have ended (a request has n of them), by finish reason.",
        by(lambda r: r.stats.requests_finished_total), ("reason",),
    ),
    Family(
        "jaxserve_requests_rejected_total", "counter", "requests",
        "Requests that the engine refused, by the reason of the error.",
        by(lambda r: r.measures.refused), ("reason",),
    ),
    Family(
        "jaxserve_prompt_tokens_total", "counter", "tokens",
        "Prompt tokens computed; those taken from the prefix cache are not.",
        one(lambda r: r.stats.prompt_tokens_total),
    ),
    Family(
        "jaxserve_output_tokens_total", "counter", "tokens",
        "Tokens generated.",
        one(lambda r: r.stats.output_tokens_total),
    ),
    Family(
        "jaxserve_output_tokens_per_second", "gauge", "tokens per second",
        "Tokens generated per second, over the last ten seconds.",
        one(lambda r: r.stats.output_tokens_per_second),
    ),
    Family(
        "jaxserve_rows_running", "gauge", "rows",
        "Sequences being computed, by data shard.",
        _rows, ("shard",),
    ),
    Family(
        "jaxserve_rows_max", "gauge", "rows",
        "Sequences that can be computed at once, of all data shards.",
        one(lambda r: r.stats.rows_max),
    ),
    Family(
        "jaxserve_requests_waiting", "gauge", "requests",
        "Requests in the queue, preempted ones included.",
        one(lambda r: r.stats.requests_waiting),
    ),
    Family(
        "jaxserve_waiting_tokens", "gauge", "tokens",
        "Prompt tokens of the requests that wait for their first step.",
        one(lambda r: r.stats.tokens_waiting),
    ),
    Family(
        "jaxserve_queue_age_seconds", "gauge", "seconds",
        "How long the oldest waiting request has waited; 0 when none waits.",
        one(lambda r: r.stats.queue_age_seconds),
    ),
    Family(
        "jaxserve_pages", "gauge", "pages",
        "Pages of the pool by state (free, used, cached) and data shard; the null page is not "
        "counted.",
        _pages, ("state", "shard"),
    ),
    Family(
        "jaxserve_page_tokens", "gauge", "tokens",
        "Tokens in one page.",
        one(lambda r: r.stats.page_tokens),
    ),
    Family(
        "jaxserve_preemptions_total", "counter", "sequences",
        "Sequences that gave their pages back and were computed again.",
        one(lambda r: r.stats.preemptions_total),
    ),
    Family(
        "jaxserve_prefix_lookup_tokens_total", "counter", "tokens",
        "Tokens of admitted sequences, looked up in the prefix cache.",
        one(lambda r: _prefix(r, "lookup")),
    ),
    Family(
        "jaxserve_prefix_hit_tokens_total", "counter", "tokens",
        "Those that were found there.",
        one(lambda r: _prefix(r, "hit")),
    ),
    Family(
        "jaxserve_steps_total", "counter", "steps",
        "Steps that have run.",
        one(lambda r: r.stats.steps_total),
    ),
    Family(
        "jaxserve_padding_ratio", "gauge", "ratio",
        "Share of the computed token places that were padding, since the start.",
        one(lambda r: r.stats.padding_waste),
    ),
    Family(
        "jaxserve_compiles_after_ready_total", "counter", "programs",
        "Programs that requests had to wait for; anything but 0 is a fault.",
        one(lambda r: r.stats.compiles_after_ready),
    ),
    Family(
        "jaxserve_last_step_age_seconds", "gauge", "seconds",
        "Since a step last finished while there was work; 0 when idle.",
        one(lambda r: r.stats.last_step_age_seconds),
    ),
    Family(
        "jaxserve_healthy", "gauge", "0 or 1",
        "1 while the engine can answer.",
        one(lambda r: int(r.stats.healthy)),
    ),
    Family(
        "jaxserve_draining", "gauge", "0 or 1",
        "1 once new requests are refused because the server shuts down.",
        one(lambda r: int(r.stats.draining)),
    ),
    Family(
        "jaxserve_http_requests_total", "counter", "requests",
        "HTTP requests that have ended, by route and status (499: the client left first).",
        lambda r: sorted(r.http.items()), ("route", "status"),
    ),
    Family(
        "jaxserve_model_info", "gauge", "always 1",
        "The served model.",
        _model,
        (
            *("model_name", "digest", "architecture", "dtype", "kv_dtype"),
            *("quantization", "mesh", "platform"),
        ),
    ),
    Family(
        "jaxserve_build_info", "gauge", "always 1",
        "This server.",
        _build, ("version", "python"),
    ),
    Family(
        "jaxserve_time_to_first_token_seconds", "histogram", "seconds",
        "From a request's acceptance to its first token.",
        one(lambda r: r.measures.time_to_first_token),
    ),
    Family(
        "jaxserve_inter_token_latency_seconds", "histogram", "seconds",
        "Between two tokens of a choice.",
        one(lambda r: r.measures.inter_token_latency),
    ),
    Family(
        "jaxserve_time_per_output_token_seconds", "histogram", "seconds",
        "Mean time between the tokens of a choice; one observation for each answered choice.",
        one(lambda r: r.measures.time_per_output_token),
    ),
    Family(
        "jaxserve_request_seconds", "histogram", "seconds",
        "From acceptance to the end, of answered requests: all choices ended with stop or length.",
        one(lambda r: r.measures.end_to_end),
    ),
    Family(
        "jaxserve_request_queue_seconds", "histogram", "seconds",
        "From acceptance to the first step, of requests that got a token.",
        one(lambda r: r.measures.queue),
    ),
    Family(
        "jaxserve_request_prefill_seconds", "histogram", "seconds",
        "From the first step to the first token.",
        one(lambda r: r.measures.prefill),
    ),
    Family(
        "jaxserve_request_decode_seconds", "histogram", "seconds",
        "From the first token to the last, of answered requests.",
        one(lambda r: r.measures.decode),
    ),
    Family(
        "jaxserve_request_inference_seconds", "histogram", "seconds",
        "From the first step to the last token, of answered requests.",
        one(lambda r: r.measures.inference),
    ),
    Family(
        "jaxserve_request_prompt_tokens", "histogram", "tokens",
        "Prompt tokens of answered requests, cached ones included.",
        one(lambda r: r.measures.prompt_tokens),
    ),
    Family(
        "jaxserve_request_output_tokens", "histogram", "tokens",
        "Output tokens of answered requests, all choices together.",
        one(lambda r: r.measures.output_tokens),
    ),
    Family(
        "jaxserve_request_max_tokens", "histogram", "tokens",
        "max_tokens of answered requests that gave it.",
        one(lambda r: r.measures.max_tokens),
    ),
    Family(
        "jaxserve_request_choices", "histogram", "choices",
        "n of answered requests.",
        one(lambda r: r.measures.choices),
    ),
    Family(
        "jaxserve_step_tokens", "histogram", "tokens",
        "Tokens that a step computed, padding left out.",
        one(lambda r: r.measures.step_tokens),
    ),
    Family(
        "jaxserve_step_seconds", "histogram", "seconds",
        "Time of a step by kind (decode, prefill, mixed): from its dispatch, or the end of the one "
        "before, to its end.",
        by(lambda r: r.measures.step_seconds), ("kind",),
    ),
    Family(
        "jaxserve_phase_seconds", "histogram", "seconds",
        "Time of the engine's thread in one turn by phase (plan, pack, dispatch, wait, publish).",
        by(lambda r: r.measures.phase_seconds), ("phase",),
    ),
)  # fmt: skip
