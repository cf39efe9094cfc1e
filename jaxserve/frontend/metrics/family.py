"""What a metric is: a name and labels that are promised, and how its series are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from jaxserve.engine.measures import EngineMeasures, HistogramSnapshot
from jaxserve.engine.stats import EngineStats
from jaxserve.frontend.model_info import ModelInfo

Value = float | int | HistogramSnapshot
Labelled = Iterable[tuple[tuple[str, ...], Value]]
"""(values of the labels, value) of every series."""


@dataclass(frozen=True)
class Reading:
    """What one scrape is made of."""

    stats: EngineStats
    measures: EngineMeasures
    info: ModelInfo
    http: Mapping[tuple[str, str], int]
    """HTTP requests by route and status."""


@dataclass(frozen=True)
class Family:
    """One metric."""

    name: str
    """As it is scraped; counters end with ``_total``."""
    type: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    read: Callable[[Reading], Labelled]
    labels: tuple[str, ...] = ()
    bounds: Sequence[float | int] | None = None
    """Buckets that are told; None tells all that the engine counts."""

    def collect(self, reading: Reading) -> Metric:
        """Returns the metric with its series."""
        if self.type == "histogram":
            histogram = HistogramMetricFamily(self.name, self.help, labels=self.labels)
            for labels, value in self.read(reading):
                assert isinstance(value, HistogramSnapshot), f"{self.name} is a number"
                counted = [
                    (floatToGoString(le), count) for le, count in value.cumulative(self.bounds)
                ]
                histogram.add_metric(labels, [*counted, ("+Inf", value.count)], value.sum)
            return histogram
        kind = CounterMetricFamily if self.type == "counter" else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in self.read(reading):
            assert not isinstance(value, HistogramSnapshot), f"{self.name} is a histogram"
            family.add_metric(labels, value)
        return family


def one(read: Callable[[Reading], Value]) -> Callable[[Reading], Labelled]:
    """A metric of one series."""
    return lambda reading: [((), read(reading))]


def by(read: Callable[[Reading], Mapping[str, Value]]) -> Callable[[Reading], Labelled]:
    """A metric with one label."""
    return lambda reading: [((label,), value) for label, value in sorted(read(reading).items())]
