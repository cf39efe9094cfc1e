"""``/live`` over a real engine and a real socket, and the files of the page."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2 as httpx
import pytest

from jaxserve.engine.engine import Engine
from jaxserve.frontend.http import live
from jaxserve.frontend.http.page import files
from jaxserve.testing import counting_engine
from tests.frontend.http.over_the_engine import served

BOUND_S = 20.0


def events(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


def until(told: Iterator[Any], is_wanted: Callable[[Any], bool]) -> Any:
    for _, event in zip(range(100), told, strict=False):
        if is_wanted(event):
            return event
    raise AssertionError("never told")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(live, "INTERVAL_S", 0.02)
    return counting_engine(num_pages=65)[0]


def test_a_watcher_sees_what_happens(engine: Engine) -> None:
    with served(engine) as client, client.stream("GET", "/live") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        told = events(response)
        first = next(told)
        assert (first["counts"]["finished"], first["pages"]["free"]) == (0, 64)
        body = {"prompt": [*range(1, 10)], "max_tokens": 4, "ignore_eos": True}
        assert httpx.post(f"{client.base_url}/v1/completions", json=body).status_code == 200
        seen = until(told, lambda event: event["counts"]["finished"] == 1)

        assert seen["tokens"]["output_total"] == 4
        pages = until(told, lambda event: event["pages"]["cached"])["pages"]
        assert (pages["cached"], pages["used"]) == (engine.stats().pages_cached, 0)
        assert pages["map"]["pages_per_cell"] == 1


def test_an_engine_that_nobody_watches_is_asked_for_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    take = engine.pages

    def counted() -> Any:
        nonlocal asked
        asked += 1
        return take()

    monkeypatch.setattr(engine, "pages", counted)
    with served(engine) as client:
        client.get("/health")
        assert asked == 0
        with client.stream("GET", "/live") as response:
            until(events(response), lambda event: asked >= 3)
        left, before = threading.Event(), -1
        for _ in range(200):  # Until the server has noticed.
            before = asked
            left.wait(0.1)
            if asked == before:
                break
        assert asked == before


def test_watchers_are_bounded_and_make_place_when_they_leave(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_WATCHERS", 2)
    with served(engine) as client:
        with ExitStack() as watching:
            streams = [watching.enter_context(client.stream("GET", "/live")) for _ in range(2)]
            # Held: an iterator that is dropped closes its response.
            told = [events(response) for response in streams]
            assert [next(each)["counts"]["steps"] for each in told] == [0, 0]
            refused = client.get("/live")
            assert refused.status_code == 503
            assert "2 watch already" in refused.json()["error"]["message"]
        statuses: list[int] = []
        while statuses[-1:] != [200] and len(statuses) < 200:
            with client.stream("GET", "/live") as response:
                statuses.append(response.status_code)
        assert statuses[-1] == 200


def test_an_engine_in_a_long_step_is_told_without_a_picture_and_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "INTERVAL_S", 0.02)
    engine, runner = counting_engine()
    let_go, waits = threading.Event(), threading.Event()

    def wait() -> None:
        waits.set()
        assert let_go.wait(BOUND_S)

    runner.on_wait = wait
    with served(engine) as client, client.stream("GET", "/live") as response:
        told = events(response)
        next(told)
        body = {"prompt": [1], "max_tokens": 2, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert waits.wait(BOUND_S)
            until(told, lambda event: event["pages"]["map"] is None)
            for _ in range(5):
                assert next(told)["rows"]["running"] <= 1
            assert len(engine._inbox) <= 1
            let_go.set()
            assert "[DONE]" in answer.read().decode()
        until(told, lambda event: event["pages"]["map"] is not None)


def test_a_server_that_stops_does_not_wait_for_watchers(engine: Engine) -> None:
    """``served`` stops the server while somebody watches, and the stream ends with the reason."""
    with ExitStack() as undo:
        client = undo.enter_context(served(engine))
        own = httpx.Client(base_url=str(client.base_url), timeout=BOUND_S)
        undo_later = ExitStack()
        undo_later.enter_context(own)
        response = undo_later.enter_context(own.stream("GET", "/live"))
        told = events(response)
        next(told)
        undo.close()
        last = list(told)[-1]
        undo_later.close()

    assert "draining" in last["error"]["message"]


def test_the_page_and_its_files_are_served_under_a_strict_policy(engine: Engine) -> None:
    with served(engine) as client:
        for name in files():
            response = client.get("/" if name == "index.html" else f"/page/{name}")
            assert response.status_code == 200
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
        for path in ("/page/", "/page/nothing.js", "/page/../config.py", "/page/%2e%2e/config.py"):
            assert client.get(path).status_code == 404


def test_the_page_names_only_its_own_files_and_has_no_script_within() -> None:
    texts = {name: content.decode() for name, (content, _) in files().items()}

    assert {"index.html", "page.css", "main.js", "chat.js", "live.js", "icon.svg"} <= texts.keys()
    page = texts["index.html"]
    assert "<script>" not in page
    assert " style=" not in page
    assert " on" not in {part.split("=")[0][:3] for part in page.split("<")}
    for name, text in texts.items():
        addresses = [word for word in text.replace('"', " ").split() if "://" in word]
        assert [word for word in addresses if "www.w3.org/2000/svg" not in word] == [], name
