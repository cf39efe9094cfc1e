"""The page in a real browser, over a real tiny engine: what a person does, and what they see."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from jaxserve.frontend.grpc.config import ServerConfig
from jaxserve.frontend.grpc.server import ServerThread
from jaxserve.frontend.http.config import HttpConfig
from jaxserve.llm import LLM

CHROMIUM = shutil.which("chromium")
INSTALL = "apt-get install -y chromium"
LONG_MS = 30_000.0
"""For what takes a fraction of a second on a quiet machine."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no browser to look at the page with: {INSTALL}"),
]


@dataclass
class Service:
    """A tiny model behind both doors."""

    llm: LLM
    url: str

    def metric(self, name: str, labels: str = "") -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=20).text
        found = re.search(rf"^{name}{re.escape(labels)} (\S+)$", text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])


@dataclass
class Tab:
    """A page, and what went wrong in it."""

    page: Page
    problems: list[str] = field(default_factory=list[str])
    hosts: set[str] = field(default_factory=set[str])

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_role("button", name="Send").click()

    def set(self, **values: Any) -> None:
        """Fills parameters by their names."""
        self.page.locator("#parameters").evaluate("details => { details.open = true; }")
        for name, value in values.items():
            field = self.page.locator(f"#parameters-form [name={name}]")
            if isinstance(value, bool):
                field.set_checked(value)
            else:
                field.fill(str(value))

    def wait_answered(self) -> None:
        expect(self.page.get_by_role("button", name="Send")).to_be_visible(timeout=LONG_MS)


@pytest.fixture(scope="module")
def service(cache_dir: Any) -> Iterator[Service]:
    with LLM(
        "dummy:tiny-llama",
        progress=False,
        context_tokens=512,
        kv_memory_bytes=1 << 24,
        max_rows=4,
        cache_dir=cache_dir,
    ) as llm:
        server = ServerThread(llm._text, llm.info, ServerConfig(port=0), HttpConfig(port=0))
        server.start()
        yield Service(llm, f"http://{server.http_address}")
        server.stop(0.0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        # The sandbox needs privileges that a container does not give; only our page is opened.
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def tab(service: Service, browser: Browser) -> Iterator[Tab]:
    """An open page; after the test it has neither complained nor asked another server."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    tab = Tab(page)
    page.on("console", lambda message: tab.problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: tab.problems.append(str(error)))
    page.on("request", lambda request: tab.hosts.add(request.url.split("/")[2]))
    page.route("**/v1/chat/completions", go_on)
    page.goto(service.url)
    expect(page.get_by_text("serving", exact=True)).to_be_visible(timeout=LONG_MS)
    yield tab
    context.close()
    assert tab.problems == []
    assert tab.hosts == {service.url.removeprefix("http://")}


def go_on(route: Route) -> None:
    """Lets a request ask for an answer of its full length: a random model ends it at random."""
    body: Any = route.request.post_data_json
    route.continue_(post_data=json.dumps({**body, "ignore_eos": True}))


def idle(service: Service) -> bool:
    return service.llm.stats().rows_running == 0 and service.llm.stats().pages_used == 0


@contextmanager
def held_after(llm: LLM, *, steps: int) -> Iterator[None]:
    """Lets the engine dispatch so many steps, and the next ones when the block has ended."""
    engine: Any = llm._text.engine
    runner = engine._runner
    dispatch, let_go, done = runner.dispatch, threading.Event(), 0

    def held(inputs: Any) -> Any:
        nonlocal done
        done += 1
        if done > steps:
            assert let_go.wait(60), "nobody let the engine go"
        return dispatch(inputs)

    runner.dispatch = held
    try:
        yield
    finally:
        let_go.set()
        runner.dispatch = dispatch


def test_an_answer_is_streamed_and_its_tokens_can_be_looked_at(tab: Tab) -> None:
    page = tab.page
    tab.set(max_tokens=40, temperature=0, system="Be brief.")
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    tab.ask("Hello there")
    tab.wait_answered()

    (body,) = [each for each in sent if each is not None]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there"},
    ]
    assert (body["max_tokens"], body["temperature"], body["top_logprobs"]) == (40, 0, 5)
    assert "seed" not in body
    answer = page.locator(".message.assistant")
    expect(answer.locator(".note")).to_contain_text("40 out")
    tokens = answer.locator(".token")
    assert tokens.count() == 40

    visible = next(each for each in tokens.all() if each.inner_text().strip())
    visible.hover()
    tip = page.get_by_role("tooltip")
    expect(tip.locator("tr")).to_have_count(5)  # Greedy: the token is the likeliest.
    expect(tip.locator("tr").first).to_have_class("chosen")
    expect(tip.locator("tr").first).to_contain_text("%")
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()

    answer.get_by_role("group").focus()
    page.keyboard.press("ArrowRight")
    expect(tip).to_be_visible()
    first = page.locator(".token.current")
    page.keyboard.press("ArrowRight")
    expect(first).to_have_count(1)
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_text_arrives_before_the_answer_ends(tab: Tab, service: Service) -> None:
    """The engine is held after some steps, and let go once the stream has been stopped."""
    tab.set(max_tokens=400, logprobs=False)
    with held_after(service.llm, steps=12):
        tab.ask("Go on and on")
        text = tab.page.locator(".message.assistant .text")
        expect(text).not_to_be_empty(timeout=LONG_MS)
        assert service.llm.stats().rows_running == 1
        stop = tab.page.get_by_role("button", name="Stop")
        expect(stop).to_be_visible()
        stop.click()
        expect(tab.page.locator(".message.assistant .note")).to_have_text("stopped")
    for _ in range(100):
        if idle(service):
            break
        tab.page.wait_for_timeout(50)
    assert idle(service)
    expect(tab.page.locator("#rows")).to_have_text("0", timeout=LONG_MS)
    expect(tab.page.locator("#pages-used")).to_have_text("0", timeout=LONG_MS)


def test_a_conversation_is_remembered_until_it_is_cleared(tab: Tab) -> None:
    page = tab.page
    tab.set(max_tokens=5, logprobs=False, seed=7)
    tab.ask("One")
    tab.wait_answered()
    page.reload()
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator("#parameters-now")).to_contain_text("seed 7")
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    tab.ask("Two")
    tab.wait_answered()

    (body,) = [each for each in sent if each is not None]
    assert [each["role"] for each in body["messages"]] == ["user", "assistant", "user"]
    assert body["seed"] == 7
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.get_by_text("Ask the model something.")).to_be_visible()


def test_a_refusal_is_shown_as_the_server_says_it(tab: Tab) -> None:
    page = tab.page
    tab.set(top_p=7)
    tab.ask("Hello")

    alert = page.get_by_role("alert")
    expect(alert).to_have_text(
        "400: top_p must be a finite number, above 0 and at most 1, got 7", timeout=LONG_MS
    )
    expect(page.get_by_label("Message")).to_have_value("Hello")
    tab.set(top_p=1, max_tokens=4)
    tab.ask("Hello")
    tab.wait_answered()
    expect(page.locator(".message.assistant .note").last).to_contain_text("4 out")
    # Chromium itself reports the refused request.
    assert [each for each in tab.problems if "400 (Bad Request)" not in each] == []
    tab.problems.clear()


def test_an_error_within_a_stream_is_shown(tab: Tab) -> None:
    head = {"choices": [{"index": 0, "delta": {"content": "Half an"}, "finish_reason": None}]}
    error = {"error": {"message": "the server is draining; retry elsewhere"}}

    def answer(route: Route) -> None:
        events = [f"data: {json.dumps(event)}\n\n" for event in (head, error)]
        route.fulfill(body="".join(events), content_type="text/event-stream")

    tab.page.route("**/v1/chat/completions", answer)
    tab.ask("Hello")

    expect(tab.page.get_by_role("alert")).to_have_text("the server is draining; retry elsewhere")
    expect(tab.page.locator(".message.assistant .text")).to_have_text("Half an")


def test_what_a_model_writes_is_text_and_nothing_else(tab: Tab) -> None:
    """Markup is shown as it is written; nothing of it is loaded."""
    written = "<img src='http://elsewhere.example/x'><script>document.title = 'taken'</script>"
    event = {"choices": [{"index": 0, "delta": {"content": written}, "finish_reason": "stop"}]}
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n", content_type="text/event-stream"
        ),
    )
    tab.ask("Hello")

    expect(tab.page.locator(".message.assistant .text")).to_have_text(written)
    assert "taken" not in tab.page.title()


def test_the_live_view_agrees_with_the_metrics(tab: Tab, service: Service) -> None:
    """Once the engine is idle, both show the same counts."""
    tab.set(max_tokens=20, logprobs=False)
    tab.ask("Count")
    tab.wait_answered()
    page = tab.page
    shown = {
        "#finished": service.metric("jaxserve_requests_accepted_total"),
        "#pages-free": service.metric("jaxserve_pages", '{shard="0",state="free"}'),
        "#pages-cached": service.metric("jaxserve_pages", '{shard="0",state="cached"}'),
        "#pages-used": service.metric("jaxserve_pages", '{shard="0",state="used"}'),
    }
    assert shown["#finished"] >= 1
    assert shown["#pages-used"] == 0
    for place, value in shown.items():
        expect(page.locator(place)).to_have_text(f"{value:,.0f}", timeout=LONG_MS)
    hit = service.metric("jaxserve_prefix_hit_tokens_total")
    lookup = service.metric("jaxserve_prefix_lookup_tokens_total")
    expect(page.locator("#prefix-more")).to_have_text(f"{hit:,.0f} of {lookup:,.0f} tokens")
    steps = service.metric("jaxserve_steps_total")
    output = service.metric("jaxserve_output_tokens_total")
    expect(page.locator("#counts")).to_contain_text(f"{steps:,.0f} steps")
    expect(page.locator("#counts")).to_contain_text(f"{output:,.0f} output tokens")
    latency = page.locator("[data-of=time_to_first_token] td").first
    expect(latency).to_have_text(re.compile(r"\d (µs|ms|s)$"))


def test_a_phone_shows_one_view_at_a_time(tab: Tab) -> None:
    page = tab.page
    page.set_viewport_size({"width": 390, "height": 780})
    expect(page.locator("#engine")).to_be_hidden()
    page.get_by_role("button", name="Engine").click()
    expect(page.locator("#engine")).to_be_visible()
    expect(page.locator("#chat")).to_be_hidden()
    # Nothing is wider than the screen.
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390


def test_nothing_moves_while_an_answer_is_streamed(tab: Tab) -> None:
    """What is not the conversation stays where it is, from before a request until after it."""
    places = ["#prompt", "#send", "#clear", "#pool", "#latency", "#phases", "#counts"]

    def boxes() -> dict[str, Any]:
        boxes = {place: tab.page.locator(place).bounding_box() for place in places}
        return {
            place: box and [round(box[side], 1) for side in ("x", "y", "width")]
            for place, box in boxes.items()
        }

    tab.set(max_tokens=200)
    tab.ask("First")
    tab.wait_answered()
    before = boxes()
    tab.ask("Go on")
    during = []
    while tab.page.get_by_role("button", name="Stop").is_visible():
        during.append(boxes())
    during.append(boxes())

    assert all(each == before for each in during)
