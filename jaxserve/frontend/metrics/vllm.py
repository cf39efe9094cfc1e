"""What vLLM measures, too, under its names, labels and buckets, so that its dashboards fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxserve.engine.measures import REQUEST_S, TOKEN_S
from jaxserve.frontend.metrics.family import Family, Labelled, Reading, by, one
from jaxserve.frontend.metrics.own import OWN

REASONS = {"cancelled": "abort", "deadline": "abort"}
"""vLLM's word for ours, where it differs."""


def _used_share(reading: Reading) -> float:
    return reading.stats.pages_used / max(1, reading.stats.pages_total)


def _vllm_reasons(reading: Reading) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for reason, count in reading.stats.requests_finished_total.items():
        word = REASONS.get(reason, reason)
        counts[word] = counts.get(word, 0) + count
    return counts


def _cache_config(reading: Reading) -> Labelled:
    yield (str(reading.stats.page_tokens), str(reading.stats.pages_total)), 1


def _again(
    name: str,
    own: str,
    *,
    read: Callable[[Reading], Labelled] | None = None,
    labels: tuple[str, ...] = (),
    bounds: Sequence[float | int] | None = None,
) -> Family:
    """A family of ours under vLLM's name and labels.

    Args:
        name: vLLM's.
        own: ours.
        read: where it differs by more.
        labels: vLLM's, beside those of all its metrics.
        bounds: vLLM's buckets, where ours are more.
    """
    family = next(family for family in OWN if family.name == own)
    series = read or family.read

    def told(reading: Reading) -> Labelled:
        for values, value in series(reading):
            yield (reading.info.name, "0", *values), value

    text = f"As {own}, for dashboards of vLLM."
    every = ("model_name", "engine", *labels)
    return Family(name, family.type, family.unit, text, told, every, bounds)


VLLM = (
    _again(
        "vllm:num_requests_running", "jaxserve_rows_running",
        read=one(lambda r: r.stats.rows_running),
    ),
    _again("vllm:num_requests_waiting", "jaxserve_requests_waiting"),
    _again("vllm:kv_cache_usage_perc", "jaxserve_pages", read=one(_used_share)),
    _again(
        "vllm:cache_config_info", "jaxserve_page_tokens",
        read=_cache_config, labels=("block_size", "num_gpu_blocks"),
    ),
    _again("vllm:prompt_tokens_total", "jaxserve_prompt_tokens_total"),
    _again("vllm:generation_tokens_total", "jaxserve_output_tokens_total"),
    _again("vllm:prefix_cache_queries_total", "jaxserve_prefix_lookup_tokens_total"),
    _again("vllm:prefix_cache_hits_total", "jaxserve_prefix_hit_tokens_total"),
    _again("vllm:num_preemptions_total", "jaxserve_preemptions_total"),
    _again(
        "vllm:request_success_total", "jaxserve_requests_finished_total",
        read=by(_vllm_reasons), labels=("finished_reason",),
    ),
    _again("vllm:time_to_first_token_seconds", "jaxserve_time_to_first_token_seconds"),
    _again(
        "vllm:inter_token_latency_seconds", "jaxserve_inter_token_latency_seconds", bounds=TOKEN_S
    ),
    # The older name of the same.
    _again(
        "vllm:time_per_output_token_seconds", "jaxserve_inter_token_latency_seconds",
        bounds=TOKEN_S,
    ),
    _again(
        "vllm:request_time_per_output_token_seconds", "jaxserve_time_per_output_token_seconds",
        bounds=TOKEN_S,
    ),
    _again("vllm:e2e_request_latency_seconds", "jaxserve_request_seconds", bounds=REQUEST_S),
    _again(
        "vllm:request_queue_time_seconds", "jaxserve_request_queue_seconds", bounds=REQUEST_S
    ),
    _again(
        "vllm:request_prefill_time_seconds", "jaxserve_request_prefill_seconds", bounds=REQUEST_S
    ),
    _again(
        "vllm:request_decode_time_seconds", "jaxserve_request_decode_seconds", bounds=REQUEST_S
    ),
    _again(
        "vllm:request_inference_time_seconds", "jaxserve_request_inference_seconds",
        bounds=REQUEST_S,
    ),
    _again("vllm:request_prompt_tokens", "jaxserve_request_prompt_tokens"),
    _again("vllm:request_generation_tokens", "jaxserve_request_output_tokens"),
    _again("vllm:request_params_max_tokens", "jaxserve_request_max_tokens"),
    _again("vllm:request_params_n", "jaxserve_request_choices"),
    _again("vllm:iteration_tokens_total", "jaxserve_step_tokens"),
)  # fmt: skip
