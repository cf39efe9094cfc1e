"""The benchmark beside other engines: what is asked, what is made of it, and that children end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.machine import descendants, process_stats
from bench.peers import report
from bench.peers.__main__ import FIRST, VOCAB_SIZE, is_worth_repeating, questions
from bench.peers.drivers.http import DIALECTS
from bench.peers.drivers.stepped import Stepped
from bench.peers.process import ChildError, running
from bench.peers.protocol import Question, Reply
from bench.peers.report import METRICS, Spread, best_peer, equal_share, measure, ratio, table
from bench.peers.systems import CLASSES, SYSTEMS, WORKLOADS, Places, System
from bench.workloads import WARM_UP

# -- what is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "requests", "prompts", "outputs"),
    [
        ("W1", 1, (128, 128), (128, 128)),
        ("W2", 64, (64, 512), (32, 256)),
        ("W3", 96, (128, 128), (64, 64)),
        ("W4", 64, (544, 544), (32, 32)),
        ("W5", 1, (4096, 4096), (16, 16)),
    ],
)
def test_a_round_has_the_lengths_of_its_workload_and_ids_of_its_own(
    workload: str, requests: int, prompts: tuple[int, int], outputs: tuple[int, int]
) -> None:
    one, other = questions(workload, 0), questions(workload, 1)
    assert one == questions(workload, 0)
    assert len(one) == requests
    assert all(prompts[0] <= len(question.prompt) <= prompts[1] for question in one)
    assert all(outputs[0] <= question.output_tokens <= outputs[1] for question in one)
    assert all(0 <= token < VOCAB_SIZE for question in one for token in question.prompt)
    assert [len(question.prompt) for question in one] == [len(again.prompt) for again in other]
    assert all(a.prompt[:32] != b.prompt[:32] for a, b in zip(one, other, strict=True))


def test_only_one_workload_has_a_prefix_that_all_share() -> None:
    assert len({tuple(question.prompt[:512]) for question in questions("W4", 0)}) == 1
    assert len({tuple(question.prompt[512:]) for question in questions("W4", 0)}) == 64
    assert len({tuple(question.prompt[:32]) for question in questions("W2", 0)}) == 64


def test_warming_up_is_short_and_on_other_ids() -> None:
    for workload in WORKLOADS:
        warm = questions(workload, WARM_UP)
        assert len(warm) <= 32
        assert all(question.output_tokens <= 16 for question in warm)
        assert warm[0].prompt[:32] != questions(workload, 0)[0].prompt[:32]
    assert FIRST.output_tokens == 1


def test_every_system_is_named_once_and_every_class_has_both_sides() -> None:
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS)
    for precision_class in CLASSES:
        sides = {one.is_ours for one in SYSTEMS if one.precision_class == precision_class}
        assert sides == {True, False}


def test_options_are_json_and_a_missing_peer_names_what_it_lacks(tmp_path: Path) -> None:
    places = Places(tmp_path, tmp_path / "model.gguf")
    for system in SYSTEMS:
        assert json.dumps(system.options(places))
        missing = system.missing(places)
        assert missing is not None
        assert not missing.exists()


# -- what is made of it ----------------------------------------------------------------------------


def test_a_run_is_measured_from_the_first_request_sent_to_the_last_answer_ended() -> None:
    asked = [Question([1, 2], 3), Question([3], 1)]
    replies = [Reply(10.0, [10.5, 10.6, 10.8], [7, 8, 9], 10.8), Reply(10.2, [12.0], [7], 12.0)]
    found = measure(asked, replies)
    assert found["wall_s"] == 2.0
    assert found["tokens_per_s"] == 2.0
    assert found["first_ms"] == pytest.approx((500 + 1800) / 2)
    assert found["gap_ms"] == pytest.approx(150)
    assert "decode_per_s" not in found


def test_one_stream_is_told_by_the_tokens_after_the_first() -> None:
    reply = Reply(0.0, [1.0, 1.5, 2.0], [7, 8, 9], 2.0)
    assert measure([Question([1], 3)], [reply])["decode_per_s"] == 2.0


def test_a_short_answer_makes_no_numbers() -> None:
    # As many tokens in all as were asked for: still one of them is short.
    asked = [Question([1], 2), Question([1], 2)]
    replies = [Reply(0.0, [1.0], [7], 1.0), Reply(0.0, [1.0], [7, 8, 9], 1.0)]
    assert measure(asked, replies) == {"short": "4 of 4 tokens"}


def system(
    rates: Sequence[float], *, precision_class: str = "bf16", is_ours: bool = False, **other: Any
) -> dict[str, Any]:
    """What a document says of a system that answered W2 at these rates, round by round."""
    runs = {
        str(number): {"tokens_per_s": rate, "wall_s": 9200 / rate, "other_cores": 0.0}
        for number, rate in enumerate(rates)
    }
    return {
        "is_ours": is_ours,
        "precision": precision_class,
        "class": precision_class,
        "door": "gRPC" if is_ours else "HTTP",
        "version": "1",
        "reason": "",
        "starts_s": [1.0, 3.0],
        "peak_bytes": [2_000_000_000],
        "failures": {},
        "runs": {"W2": runs} if rates else {},
        **other,
    }


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "systems": {
            "ours": system([120.0, 90.0, 100.0], is_ours=True),
            "ours-4": system([200.0, 200.0, 210.0], is_ours=True, precision_class="4 bit"),
            "fast": system([60.0, 60.0, 50.0]),
            "slow": system([20.0]),
            "small": system([40.0, 40.0], precision_class="4 bit"),
            "absent": system([], reason="not installed (no python): make peers"),
        },
        "quality": {"tokens": 32, "prompts": 8, "reason": "", "systems": {}},
        "notes": [],
    }


(RATE,) = METRICS["W2"]


def test_the_best_peer_is_of_the_class_or_of_all(document: dict[str, Any]) -> None:
    assert best_peer(document, "W2", RATE, "bf16") == "fast"
    assert best_peer(document, "W2", RATE, "4 bit") == "small"
    assert best_peer(document, "W2", RATE, None) == "fast"
    assert best_peer(document, "W2", RATE, "8 bit") is None


def test_ratios_are_of_rounds_that_both_ran(document: dict[str, Any]) -> None:
    assert ratio(document, "W2", RATE, "ours", "fast") == Spread(2.0, 1.5, 2.0, 3)
    assert ratio(document, "W2", RATE, "ours-4", "small") == Spread(5.0, 5.0, 5.0, 2)
    assert ratio(document, "W2", RATE, "ours", "absent") is None


def test_less_time_is_better() -> None:
    (wall,) = METRICS["W4"]
    assert wall.times_better(2.0, 4.0) == 2.0
    assert RATE.times_better(2.0, 4.0) == 0.5


def test_a_peer_is_asked_again_where_it_can_change_a_ratio(document: dict[str, Any]) -> None:
    assert is_worth_repeating(document, "ours", "W2")
    assert is_worth_repeating(document, "fast", "W2")
    assert not is_worth_repeating(document, "slow", "W2")
    assert not is_worth_repeating(document, "absent", "W2")
    # Best of its class, but each run takes minutes.
    document["systems"]["small"] = system([20.0], precision_class="4 bit")
    assert not is_worth_repeating(document, "small", "W2")
    document["systems"]["small"]["runs"]["W2"]["0"]["wall_s"] = 5.0
    assert is_worth_repeating(document, "small", "W2")
    document["systems"]["fast"]["failures"]["W2"] = "it ended"
    assert not is_worth_repeating(document, "fast", "W2")


def test_the_table_says_ratios_doors_and_who_is_missing(document: dict[str, Any]) -> None:
    document["systems"]["slow"]["runs"]["W2"]["1"] = {"short": "3 of 4 tokens"}
    document["systems"]["fast"]["runs"]["W2"]["0"]["other_cores"] = 0.5
    said = table(document)
    lines = said.splitlines()
    assert any(line.split()[:2] == ["slow", "bf16"] and "20 (once)" in line for line in lines)
    assert any("fast (HTTP)" in line and "2 (1.5..2)" in line for line in lines)
    assert any("small (HTTP)" in line and "5 (5..5)" in line for line in lines)
    assert "absent could not run: not installed (no python): make peers" in said
    assert "slow W2 run 1 is refused: short, 3 of 4 tokens" in said
    assert "fast W2 run 0 was disturbed: others used 0.50 cores" in said


def test_a_document_without_any_run_has_a_table(document: dict[str, Any]) -> None:
    document["systems"] = {"absent": {**document["systems"]["absent"], "starts_s": []}}
    document["quality"]["reason"] = "not compared"
    assert table(document) == (
        "quality: not compared\n\nabsent could not run: not installed (no python): make peers"
    )


def test_answers_are_compared_up_to_their_first_difference() -> None:
    assert equal_share([[1, 2, 3]], [[1, 2, 3]]) == 1.0
    assert equal_share([[9, 2, 3], [1]], [[1, 2, 3], [1]]) == 0.25
    assert equal_share([], []) == 0.0


def test_titles_and_metrics_are_there_for_every_workload() -> None:
    assert set(WORKLOADS) == METRICS.keys() == report.TITLES.keys()


# -- drivers ---------------------------------------------------------------------------------------


class Counting(Stepped):
    """Says "last token plus one", a token of every request a step."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, list[int]] = {}
        self.most_live = 0

    def submit(self, key: str, question: Question) -> None:
        self.live[key] = [question.prompt[-1], question.output_tokens]
        self.most_live = max(self.most_live, len(self.live))

    def step(self) -> list[tuple[str, list[int], bool]]:
        said = []
        for key, state in list(self.live.items()):
            state[0] += 1
            state[1] -= 1
            said.append((key, [state[0]], not state[1]))
            if not state[1]:
                del self.live[key]
        return said


@pytest.mark.parametrize(("clients", "most"), [(None, 5), (2, 2)])
def test_a_stepped_engine_has_no_more_requests_than_clients(clients: int | None, most: int) -> None:
    engine = Counting()
    asked = [Question([10 * number], 1 + number) for number in range(5)]
    replies = engine.ask(asked, clients)
    assert engine.most_live == most
    assert [reply.ids for reply in replies] == [
        [10 * number + 1 + count for count in range(1 + number)] for number in range(5)
    ]
    assert "short" not in measure(asked, replies)


def test_servers_are_asked_for_all_tokens_greedily() -> None:
    for dialect in DIALECTS.values():
        body = dialect.body(Question([5, 6], 7), "model")
        assert body["prompt"] == [5, 6]
        assert body["temperature"] == 0
        assert body["ignore_eos"]
        assert 7 in (body.get("n_predict"), body.get("max_tokens"))
    assert DIALECTS["llama.cpp"].ids({"content": "x", "tokens": [4]}) == [4]
    assert DIALECTS["openai"].ids({"choices": [{"text": "x", "token_ids": [4, 5]}]}) == [4, 5]
    assert DIALECTS["openai"].ids({"choices": [{"text": "", "token_ids": None}]}) == []


# -- children --------------------------------------------------------------------------------------

CHILD = """
import json, subprocess, sys, time
ready = {"version": "1", "process_id": 7}
def tell(line): print(json.dumps(line), flush=True)
def fork(): return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
"""


@dataclass(frozen=True, kw_only=True)
class Scripted(System):
    """A system whose child runs a script of the test."""

    script: str

    def command(self, places: Places) -> list[str]:
        return [sys.executable, "-c", CHILD + self.script]


@pytest.fixture
def script(tmp_path: Path) -> Any:
    def start(text: str) -> Any:
        child = Scripted(
            name="double",
            precision="int32",
            precision_class="bf16",
            door="in process",
            peer=None,
            driver="double",
            options=lambda places: {},
            script=text,
        )
        return running(child, Places(tmp_path, tmp_path / "none"))

    return start


def test_a_child_answers_and_is_gone_with_its_children(script: Any) -> None:
    text = """
grandchild = fork()
tell({"ready": {**ready, "process_id": grandchild.pid}})
for line in sys.stdin:
    if "stop" in line:
        break
    prompt, count = json.loads(line)["ask"][0]
    tell({"replies": [{"sent_s": 0.0, "arrivals_s": [1.0], "ids": prompt * count, "end_s": 1.0}]})
"""
    with script(text) as child:
        child.wait_until_ready(20)
        assert child.version == "1"
        family = descendants([child.process.pid], process_stats())
        assert family == [child.process.pid, child.process_id]
        assert child.ask([Question([5], 2)], None, limit_s=20)[0].ids == [5, 5]
    assert child.process.returncode == 0
    assert not is_running(child.process_id)


def test_a_child_that_hangs_is_ended_with_its_children(script: Any) -> None:
    text = """
tell({"ready": {**ready, "process_id": fork().pid}})
time.sleep(600)
"""
    with script(text) as child:
        child.wait_until_ready(20)
        with pytest.raises(ChildError, match="1 requests took more than 0 s"):
            child.ask([Question([5], 2)], None, limit_s=0.2)
        child.stop_s = 0.1
    assert child.process.returncode == -9
    assert not is_running(child.process_id)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('tell({"error": "ValueError: no model"})', "ValueError: no model"),
        ("sys.exit(3)", "it ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "it ended by signal 9"),
    ],
)
def test_a_child_that_cannot_start_says_why(script: Any, text: str, reason: str) -> None:
    with pytest.raises(ChildError, match=reason), script(text) as child:
        child.wait_until_ready(20)


def is_running(process_id: int) -> bool:
    """A zombie that nobody has waited for does not run."""
    try:
        return " Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
