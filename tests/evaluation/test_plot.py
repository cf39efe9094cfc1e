"""The picture: well-formed, with a bar for each setting, as long as its number says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from jaxserve.evaluation.plot import PANEL, svg
from jaxserve.evaluation.result import Against, Evaluation, Outcome

SVG = "{http://www.w3.org/2000/svg}"


def outcome(name: str, against: Against | None) -> Outcome:
    return Outcome(
        setting=name,
        flags={},
        dtype="float32",
        weights="int8",
        kv_dtype="bfloat16",
        nats_per_token=3.0,
        perplexity=math.exp(3.0),
        against=against,
        weight_bytes=1_234_567,
        kv_bytes_per_token=1000,
        seconds=1.0,
    )


def against(more: float, kl: float, error: float | None = None) -> Against:
    return Against(
        more_nats=more,
        more_nats_error=error,
        perplexity_ratio=math.exp(more),
        perplexity_ratio_error=error,
        kl_mean=kl,
        kl_error=None if error is None else kl / 10,
        kl_p99=kl * 8,
        kl_max=kl * 20,
        same_top=0.9,
    )


def evaluation(**compared: Against) -> Evaluation:
    outcomes = [outcome("plain", None), *(outcome(*each) for each in compared.items())]
    return Evaluation(
        model="a<b",
        texts=["book.txt"],
        text_bytes=9999,
        windows=3,
        window_tokens=1024,
        scored_tokens=3069,
        left_out_tokens=7,
        outcomes=outcomes,
    )


def parts(picture: str, name: str) -> list[Any]:
    return ElementTree.fromstring(picture).findall(f"{SVG}{name}")


def bars(picture: str, color: str) -> list[tuple[float, float]]:
    return [
        (float(each.get("x")), float(each.get("width")))
        for each in parts(picture, "rect")
        if each.get("fill") == color
    ]


def test_a_bar_is_as_long_as_the_logarithm_of_its_number() -> None:
    picture = svg(
        evaluation(
            small=against(0.001, 1e-4, 0.0005),
            large=against(0.004, 1e-2, 0.0005),
            better=against(-0.002, 1e-3, 0.0005),
        )
    )
    (small, large, better) = bars(picture, "#3b6fb6")
    assert large[1] == pytest.approx(4 * small[1], abs=0.5)
    assert better[1] == pytest.approx(2 * small[1], abs=0.5)
    assert small[0] == large[0] == pytest.approx(sum(better), abs=0.2)
    (small, large, better) = bars(picture, "#d9822b")
    decade = better[1] - small[1]
    assert decade > 0
    assert large[1] - better[1] == pytest.approx(decade, abs=0.2)
    assert len(parts(picture, "circle")) == 3
    assert max(x + width for x, width in (small, large, better)) < 940


def test_it_says_what_it_shows() -> None:
    picture = svg(evaluation(first=against(0.001, 1e-4, 0.0005), second=against(0.01, 1e-3, 0.001)))
    texts = [each.text for each in parts(picture, "text")]
    assert texts[0] == "a<b: what settings cost beside plain"
    assert texts[1] == (
        "3,069 tokens in windows of 1,024; plain has perplexity 20.09 (weights int8, cache "
        "bfloat16)"
    )
    assert {"first", "second", "perplexity ratio", "1", "1.01", "0.0001", "0.001"} <= set(texts)
    assert {"1.001", "1.0101", "1e-4", "1e-3"} <= set(texts)


@pytest.mark.parametrize(
    "compared",
    [
        {},
        {"same": against(0.0, 0.0)},
        {"same": against(0.0, 0.0, 0.0), "other": against(0.1, 1e-3)},
        {"broken": against(7.0, 9.0, 0.5), "good": against(0.0001, 1e-7, 0.0)},
    ],
    ids=["nothing", "equal", "one-window", "far-apart"],
)
def test_every_picture_stays_within_its_frame(compared: dict[str, Against]) -> None:
    picture = svg(evaluation(**compared))
    for x, width in [*bars(picture, "#3b6fb6"), *bars(picture, "#d9822b")]:
        assert width >= 0
        assert x >= 150
        assert width <= PANEL
    assert "nan" not in picture
    ticks = [each for each in parts(picture, "path") if each.get("stroke") == "#d7dbe0"]
    assert bool(ticks) == bool(compared)
    assert len(ticks) <= 16


def test_numbers_of_json_are_those_of_the_outcomes() -> None:
    found = evaluation(first=against(0.5, 0.25, 0.125))
    written = found.as_json()
    assert written["scored_tokens"] == 3069
    first = written["settings"][1]
    assert (first["setting"], first["kv_tokens_per_gib"]) == ("first", 2**30 // 1000)
    assert first["against"]["kl_mean"] == 0.25
    assert written["settings"][0]["against"] is None
    changed = replace(found, outcomes=found.outcomes[:1])
    assert len(changed.as_json()["settings"]) == 1
