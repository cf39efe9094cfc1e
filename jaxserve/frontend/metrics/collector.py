"""Fills the metrics from an engine's snapshots when it is scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from jaxserve.frontend.engine_api import EngineApi
from jaxserve.frontend.metrics.family import Family, Reading
from jaxserve.frontend.metrics.own import OWN
from jaxserve.frontend.metrics.vllm import VLLM
from jaxserve.frontend.model_info import ModelInfo

FAMILIES: tuple[Family, ...] = (*OWN, *VLLM)


class EngineCollector(Collector):
    """Reads the engine when it is scraped, and keeps nothing."""

    def __init__(
        self, engine: EngineApi, info: ModelInfo, http: Callable[[], Mapping[tuple[str, str], int]]
    ) -> None:
        """Tells of ``engine``; ``http`` gives requests by route and status."""
        self._engine = engine
        self._info = info
        self._http = http

    def collect(self) -> Iterator[Metric]:
        """Yields every family, all of one reading."""
        engine = self._engine
        reading = Reading(engine.stats(), engine.measures(), self._info, self._http())
        for family in FAMILIES:
            yield family.collect(reading)

    def describe(self) -> Iterator[Metric]:
        """Names the families without asking the engine."""
        return iter(())


def make_registry(collector: EngineCollector) -> CollectorRegistry:
    """Returns what a scrape reads: the engine, and this process (memory, time, descriptors)."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    return registry
