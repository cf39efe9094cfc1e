"""What ``/metrics`` promises: names, types, labels, the document, and numbers that are true."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from jaxserve.engine.engine import Engine
from jaxserve.frontend.metrics.collector import FAMILIES
from jaxserve.testing import counting_engine
from tests.frontend.http.over_the_engine import served

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
PROMISED = {
    "jaxserve_requests_accepted_total": ("counter", ()),
    "jaxserve_requests_finished_total": ("counter", ("reason",)),
    "jaxserve_requests_rejected_total": ("counter", ("reason",)),
    "jaxserve_prompt_tokens_total": ("counter", ()),
    "jaxserve_output_tokens_total": ("counter", ()),
    "jaxserve_output_tokens_per_second": ("gauge", ()),
    "jaxserve_rows_running": ("gauge", ("shard",)),
    "jaxserve_rows_max": ("gauge", ()),
    "jaxserve_requests_waiting": ("gauge", ()),
    "jaxserve_waiting_tokens": ("gauge", ()),
    "jaxserve_queue_age_seconds": ("gauge", ()),
    "jaxserve_pages": ("gauge", ("state", "shard")),
    "jaxserve_page_tokens": ("gauge", ()),
    "jaxserve_preemptions_total": ("counter", ()),
    "jaxserve_prefix_lookup_tokens_total": ("counter", ()),
    "jaxserve_prefix_hit_tokens_total": ("counter", ()),
    "jaxserve_steps_total": ("counter", ()),
    "jaxserve_padding_ratio": ("gauge", ()),
    "jaxserve_compiles_after_ready_total": ("counter", ()),
    "jaxserve_last_step_age_seconds": ("gauge", ()),
    "jaxserve_healthy": ("gauge", ()),
    "jaxserve_draining": ("gauge", ()),
    "jaxserve_http_requests_total": ("counter", ("route", "status")),
    "jaxserve_model_info": (
        "gauge",
        (
            *("model_name", "digest", "architecture", "dtype", "kv_dtype"),
            *("quantization", "mesh", "platform"),
        ),
    ),
    "jaxserve_build_info": ("gauge", ("version", "python")),
    "jaxserve_time_to_first_token_seconds": ("histogram", ()),
    "jaxserve_inter_token_latency_seconds": ("histogram", ()),
    "jaxserve_time_per_output_token_seconds": ("histogram", ()),
    "jaxserve_request_seconds": ("histogram", ()),
    "jaxserve_request_queue_seconds": ("histogram", ()),
    "jaxserve_request_prefill_seconds": ("histogram", ()),
    "jaxserve_request_decode_seconds": ("histogram", ()),
    "jaxserve_request_inference_seconds": ("histogram", ()),
    "jaxserve_request_prompt_tokens": ("histogram", ()),
    "jaxserve_request_output_tokens": ("histogram", ()),
    "jaxserve_request_max_tokens": ("histogram", ()),
    "jaxserve_request_choices": ("histogram", ()),
    "jaxserve_step_tokens": ("histogram", ()),
    "jaxserve_step_seconds": ("histogram", ("kind",)),
    "jaxserve_phase_seconds": ("histogram", ("phase",)),
    "vllm:num_requests_running": ("gauge", ()),
    "vllm:num_requests_waiting": ("gauge", ()),
    "vllm:kv_cache_usage_perc": ("gauge", ()),
    "vllm:cache_config_info": ("gauge", ("block_size", "num_gpu_blocks")),
    "vllm:prompt_tokens_total": ("counter", ()),
    "vllm:generation_tokens_total": ("counter", ()),
    "vllm:prefix_cache_queries_total": ("counter", ()),
    "vllm:prefix_cache_hits_total": ("counter", ()),
    "vllm:num_preemptions_total": ("counter", ()),
    "vllm:request_success_total": ("counter", ("finished_reason",)),
    "vllm:time_to_first_token_seconds": ("histogram", ()),
    "vllm:inter_token_latency_seconds": ("histogram", ()),
    "vllm:time_per_output_token_seconds": ("histogram", ()),
    "vllm:request_time_per_output_token_seconds": ("histogram", ()),
    "vllm:e2e_request_latency_seconds": ("histogram", ()),
    "vllm:request_queue_time_seconds": ("histogram", ()),
    "vllm:request_prefill_time_seconds": ("histogram", ()),
    "vllm:request_decode_time_seconds": ("histogram", ()),
    "vllm:request_inference_time_seconds": ("histogram", ()),
    "vllm:request_prompt_tokens": ("histogram", ()),
    "vllm:request_generation_tokens": ("histogram", ()),
    "vllm:request_params_max_tokens": ("histogram", ()),
    "vllm:request_params_n": ("histogram", ()),
    "vllm:iteration_tokens_total": ("histogram", ()),
}
"""Name -> type, labels; those of vLLM have ``model_name`` and ``engine`` before theirs."""
PROCESS = {"process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds"}
TOKEN_BUCKETS = [
    *("0.01", "0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5", "0.75", "1.0"),
    *("2.5", "5.0", "7.5", "10.0", "20.0", "40.0", "80.0", "+Inf"),
]


class Scrape:
    """One scrape: families by name, and values by name and labels."""

    def __init__(self, client: httpx.Client, accept: str = "") -> None:
        response = client.get("/metrics", headers={"accept": accept})
        assert response.status_code == 200, response.text
        self.media_type = response.headers["content-type"]
        parser = parse_openmetrics if accept.startswith("application/") else parse
        self.families: dict[str, Metric] = {f.name: f for f in parser(response.text)}
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        if name.startswith("vllm:"):
            labels |= {"model_name": "counting", "engine": "0"}
        return self.values[name, frozenset(labels.items())]


def complete(client: httpx.Client, prompt: list[int], **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "ignore_eos": True, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body)


def engine_of(**sizes: Any) -> Engine:
    return counting_engine(**sizes)[0]


def test_names_types_and_labels_are_as_promised() -> None:
    found = {family.name: (family.type, family.labels) for family in FAMILIES}
    every = ("model_name", "engine")

    assert found == {
        name: (kind, (*every, *labels) if name.startswith("vllm:") else labels)
        for name, (kind, labels) in PROMISED.items()
    }


def test_the_document_describes_every_metric_as_it_is() -> None:
    lines = re.findall(r"^\| `([\w:]+)` \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    written = {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in lines}

    assert written == {
        family.name: [
            family.type,
            ", ".join(f"`{label}`" for label in family.labels),
            family.unit,
            family.help,
        ]
        for family in FAMILIES
    }


@pytest.mark.parametrize("accept", ["", OPENMETRICS, f"{OPENMETRICS};escaping=allow-utf-8"])
def test_every_metric_is_told_in_every_form(accept: str) -> None:
    """Of an engine that has done something, so that each has a series."""
    with served(engine_of(context_tokens=60)) as client:
        complete(client, [1, 2, 3], max_tokens=4)
        assert complete(client, [1] * 60, max_tokens=4).status_code == 400
        scrape = Scrape(client, accept)

    assert ("openmetrics" in scrape.media_type) == bool(accept)
    told = {
        family.name.removesuffix("_total") if family.type == "counter" else family.name: family
        for family in FAMILIES
    }
    assert told.keys() <= scrape.families.keys()
    assert scrape.families.keys() - told.keys() >= PROCESS
    assert all(name.startswith("process_") for name in scrape.families.keys() - told.keys())
    for name, family in told.items():
        metric = scrape.families[name]
        assert (metric.type, metric.documentation) == (family.type, family.help)
        assert metric.samples, name
        for sample in metric.samples:
            assert {*sample.labels} - {"le"} == {*family.labels}, name


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=abc", "text/plain;version=x"]
)
def test_a_version_that_is_none_gets_plain_text(accept: str) -> None:
    with served(engine_of()) as client:
        response = client.get("/metrics", headers={"accept": accept})

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_the_numbers_of_known_work_are_exact() -> None:
    """Ten requests of 9 tokens, one after the other: the first fills two pages, which the others
    find. Then one that is too long, and one that its reader leaves."""
    engine = engine_of(num_pages=65, step_tokens=16)
    with served(engine) as client:
        for _ in range(10):
            assert complete(client, [*range(1, 10)], max_tokens=6).status_code == 200
        assert complete(client, [1] * 64).status_code == 400
        with client.stream(
            "POST",
            "/v1/completions",
            json={"prompt": [200], "stream": True, "ignore_eos": True},
        ) as streamed:
            next(streamed.iter_lines())
        while not engine.idle:
            client.get("/health")
        scrape = Scrape(client)
        stats = engine.stats()

    assert scrape("jaxserve_requests_accepted_total") == 11
    assert scrape("jaxserve_requests_finished_total", reason="length") >= 10
    assert scrape("jaxserve_requests_rejected_total", reason="PROMPT_TOO_LONG") == 1
    # Nine of ten computed one token of their prompt: 8 of 9 were in the cache.
    assert scrape("jaxserve_prompt_tokens_total") == 9 + 9 * 1 + 1
    assert scrape("jaxserve_prefix_lookup_tokens_total") == 10 * 9 + 1
    assert scrape("jaxserve_prefix_hit_tokens_total") == 9 * 8
    assert scrape("jaxserve_output_tokens_total") == stats.output_tokens_total >= 61
    states = {
        state: scrape("jaxserve_pages", state=state, shard="0")
        for state in ("free", "used", "cached")
    }
    assert sum(states.values()) == 64
    assert states["used"] == 0
    assert states["cached"] == stats.pages_cached > 0
    assert scrape("jaxserve_compiles_after_ready_total") == 0
    assert (scrape("jaxserve_rows_running", shard="0"), scrape("jaxserve_rows_max")) == (0, 4)
    assert scrape("jaxserve_healthy") == 1
    assert scrape("jaxserve_draining") == 0
    assert scrape("jaxserve_steps_total") == scrape("jaxserve_step_tokens_count")
    assert scrape("jaxserve_step_tokens_sum") >= 19 + 10 * 5
    assert scrape("jaxserve_build_info", version="1.2.3", python=platform.python_version()) == 1


def test_histograms_count_what_was_answered() -> None:
    """Four requests of different lengths; one of them has three choices."""
    with served(engine_of(num_pages=65)) as client:
        for length, choices in ((3, 1), (5, 1), (8, 1), (8, 3)):
            response = complete(client, [7] * length, max_tokens=4, n=choices)
            assert response.status_code == 200
        scrape = Scrape(client)

    for name in (
        "request",
        "request_queue",
        "request_prefill",
        "request_decode",
        "request_inference",
    ):
        assert scrape(f"jaxserve_{name}_seconds_count") == 4
        assert scrape(f"jaxserve_{name}_seconds_bucket", le="+Inf") == 4
    assert scrape("jaxserve_time_to_first_token_seconds_count") == 4
    assert scrape("jaxserve_inter_token_latency_seconds_count") == 6 * 3
    assert scrape("jaxserve_time_per_output_token_seconds_count") == 6
    assert scrape("jaxserve_request_prompt_tokens_sum") == 3 + 5 + 8 + 8
    assert scrape("jaxserve_request_prompt_tokens_bucket", le="5.0") == 2
    assert scrape("jaxserve_request_output_tokens_sum") == 6 * 4
    assert scrape("jaxserve_request_max_tokens_sum") == 16
    assert scrape("jaxserve_request_choices_sum") == 6
    assert scrape("jaxserve_request_choices_bucket", le="1.0") == 3
    whole = scrape("jaxserve_request_seconds_sum")
    parts = [scrape(f"jaxserve_request_{part}_seconds_sum") for part in ("queue", "inference")]
    assert sum(parts) <= whole + 1e-9


def test_what_vllm_measures_too_has_its_values_and_buckets() -> None:
    with served(engine_of(num_pages=65)) as client:
        complete(client, [1, 2, 3], max_tokens=5, n=2)
        scrape = Scrape(client)

    same = {
        "vllm:prompt_tokens_total": "jaxserve_prompt_tokens_total",
        "vllm:generation_tokens_total": "jaxserve_output_tokens_total",
        "vllm:num_requests_waiting": "jaxserve_requests_waiting",
        "vllm:e2e_request_latency_seconds_sum": "jaxserve_request_seconds_sum",
        "vllm:inter_token_latency_seconds_count": "jaxserve_inter_token_latency_seconds_count",
        "vllm:time_per_output_token_seconds_count": "jaxserve_inter_token_latency_seconds_count",
        "vllm:request_generation_tokens_sum": "jaxserve_request_output_tokens_sum",
        "vllm:iteration_tokens_total_sum": "jaxserve_step_tokens_sum",
    }
    for theirs, ours in same.items():
        assert scrape(theirs) == scrape(ours)
    assert scrape("vllm:request_success_total", finished_reason="length") == 2
    assert scrape("vllm:request_success_total", finished_reason="abort") == 0
    assert scrape("vllm:kv_cache_usage_perc") == 0
    assert scrape("vllm:cache_config_info", block_size="4", num_gpu_blocks="64") == 1
    buckets = [
        sample.labels["le"]
        for sample in scrape.families["vllm:inter_token_latency_seconds"].samples
        if sample.name.endswith("_bucket")
    ]
    assert buckets == TOKEN_BUCKETS


def test_shards_are_told_apart() -> None:
    with served(engine_of(data_shards=2)) as client:
        scrape = Scrape(client)

    for shard in ("0", "1"):
        assert scrape("jaxserve_pages", state="free", shard=shard) == 32


def test_http_requests_are_counted_by_route_and_status_and_never_by_path() -> None:
    with served(engine_of()) as client:
        for number in range(3):
            assert client.get(f"/no/such/place/{number}").status_code == 404
            assert client.get(f"/v1/models/model-{number}").status_code == 404
        client.get("/health")
        client.get("/v1/completions")
        client.post("/v1/completions", content=b"x", headers={"content-type": "text/plain"})
        client.get("/health", headers={"host": "elsewhere.example"})
        assert complete(client, [1], max_tokens=2).status_code == 200
        scrape = Scrape(client)
        again = Scrape(client)

    def count(route: str, status: int, scrape: Scrape = scrape) -> float:
        return scrape("jaxserve_http_requests_total", route=route, status=str(status))

    assert count("other", 404) == 3
    assert count("/v1/models/{name:path}", 404) == 3
    assert count("/health", 200) == 1
    assert count("/v1/completions", 405) == 1
    assert count("other", 415) == 1
    assert count("other", 421) == 1
    assert count("/v1/completions", 200) == 1
    assert count("/metrics", 200, again) == 1
