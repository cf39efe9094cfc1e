"""`jaxserve chat`: the conversation it keeps, its commands, and what interrupts it."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxserve.cli.chat import Chat
from jaxserve.engine.request import FinishReason, Timing
from jaxserve.errors import InvalidRequestError, JaxserveError, RetryableError
from jaxserve.frontend.client import Client
from jaxserve.frontend.client_types import Chunk, Finish, GenerateOptions, Usage


class ParrotStream(Iterator[Chunk]):
    def __init__(self, chunks: list[Chunk]) -> None:
        self._chunks = iter(chunks)
        self.closed = False

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        self.closed = True


class Parrot(Client):
    """Answers with what was said last, word by word, without a server."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1")
        self.asked: list[list[dict[str, str]]] = []
        self.options: dict[str, Any] = {}
        self.streams: list[ParrotStream] = []
        self.refusal: JaxserveError | None = None

    def stream(self, *, messages: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.refusal is not None:
            raise self.refusal
        self.asked.append([dict(message) for message in messages])
        self.options = options
        words = messages[-1]["content"].split()
        chunks = [Chunk(0, number, (number,), f"{word} ") for number, word in enumerate(words)]
        finish = Finish(
            0, FinishReason.STOP, Usage(3, len(words), 1), Timing(0.0, 0.1, 0.2), None, None
        )
        chunks.append(Chunk(0, len(words), (), "", finish=finish))
        self.streams.append(ParrotStream(chunks))
        return self.streams[-1]


@pytest.fixture
def parrot() -> Iterator[Parrot]:
    parrot = Parrot()
    yield parrot
    parrot.close()


def chat_with(
    parrot: Parrot,
    *,
    system: str | None = None,
    timing: bool = False,
    write: Callable[[str], object] | None = None,
) -> Chat:
    options: dict[str, Any] = {} if write is None else {"write": write}
    return Chat(parrot, GenerateOptions(max_tokens=9), system, timing=timing, **options)


def test_the_conversation_so_far_goes_with_every_message(parrot: Parrot) -> None:
    chat = chat_with(parrot, system="be brief")
    assert chat.take("one two")
    assert chat.take("three")
    system = {"role": "system", "content": "be brief"}
    first = {"role": "user", "content": "one two"}
    answer = {"role": "assistant", "content": "one two "}
    assert parrot.asked[0] == [system, first]
    assert parrot.asked[1] == [system, first, answer, {"role": "user", "content": "three"}]
    assert all(stream.closed for stream in parrot.streams)


def test_answers_are_written_as_they_come_and_end_with_a_line_end(
    parrot: Parrot, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_with(parrot, timing=True).take("one two")
    out, err = capsys.readouterr()
    assert out == "one two \n"
    assert err.startswith("[3 prompt tokens (1 cached), 2 output tokens, time to first token ")


def test_empty_lines_say_nothing(parrot: Parrot) -> None:
    assert chat_with(parrot).take("")
    assert parrot.asked == []


def test_reset_and_system_forget_the_conversation(
    parrot: Parrot, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_with(parrot, system="old")
    chat.take("one")
    chat.take("/reset")
    assert chat.messages == [{"role": "system", "content": "old"}]
    chat.take("/system be kind")
    chat.take("two")
    assert parrot.asked[-1][0] == {"role": "system", "content": "be kind"}
    assert len(parrot.asked[-1]) == 2
    chat.take("/system")
    assert chat.messages == []
    assert capsys.readouterr().err.splitlines() == [
        "the conversation is forgotten",
        "system message: be kind",
        "system message: none",
    ]


def test_params_are_shown_set_and_checked(
    parrot: Parrot, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_with(parrot)
    for line in ("/params temperature=0.5 seed=3", "/params top=1", "/params seed=x", "/params"):
        assert chat.take(line)
    assert capsys.readouterr().err.splitlines() == [
        "max_tokens=9 temperature=0.5 seed=3",
        "there is no parameter 'top'; there are max_tokens, temperature, top_p, top_k, min_p, seed",
        "seed needs a number, such as seed=1; got 'x'",
        "max_tokens=9 temperature=0.5 seed=3",
    ]
    chat.take("hello")
    assert parrot.options == {"max_tokens": 9, "temperature": 0.5, "seed": 3}


@pytest.mark.parametrize("line", ["/quit", "/exit"])
def test_quit_ends(parrot: Parrot, line: str) -> None:
    assert not chat_with(parrot).take(line)


@pytest.mark.parametrize("line", ["/help", "/hlep"])
def test_help_and_unknown_commands_list_the_commands(
    parrot: Parrot, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat_with(parrot).take(line)
    text = capsys.readouterr().err
    assert "/params [K=V ...]" in text
    assert ("there is no command /hlep" in text) == (line == "/hlep")
    assert parrot.asked == []


def test_ctrl_c_cancels_the_answer_and_keeps_what_was_said(parrot: Parrot) -> None:
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if text == "two ":
            raise KeyboardInterrupt

    chat = chat_with(parrot, write=write)
    assert chat.take("one two three")
    assert parrot.streams[0].closed
    assert written == ["one ", "two ", " [stopped]", "\n"]
    assert chat.messages[-1] == {"role": "assistant", "content": "one two "}
    assert chat.take("go on")


def test_a_refused_message_is_forgotten(parrot: Parrot) -> None:
    chat = chat_with(parrot)
    parrot.refusal = InvalidRequestError("too long", field="prompt")
    with pytest.raises(InvalidRequestError, match="too long"):
        chat.take("hello")
    assert chat.messages == []


# -- the command -----------------------------------------------------------------------------------


def test_without_a_server_one_line_says_how_to_start_one(shell: Any) -> None:
    for command in ("chat", "stats"):
        result = shell(command, "--server", "127.0.0.1:1")
        assert result.status == 1
        assert result.err == (
            "error: no server answers at 127.0.0.1:1; start one with `jaxserve launch smollm2`, or "
            "name another with --server\n"
        )


def test_a_server_that_is_only_draining_is_not_called_absent(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        error = RetryableError("draining", retry_after_s=1.0)
        error.reason = "DRAINING"
        raise error

    monkeypatch.setattr(Client, "model", refuse)
    result = shell("chat", "--server", "127.0.0.1:1")
    assert (result.status, result.err) == (1, "error: draining\n")


@pytest.mark.slow
def test_every_line_of_a_pipe_is_one_message(
    shell: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/params max_tokens=3\nAgain\n"))
    flags = ["--server", server.address, "--timing", "--max-tokens", "5", "--temperature", "0"]
    result = shell("chat", *flags)
    assert result.status == 0
    first, shown, second = result.err.splitlines()
    prompt_tokens = len("user\nHello\nassistant\n") + 3
    assert first.startswith(f"[{prompt_tokens} prompt tokens (0 cached), 5 output tokens")
    assert shown == "max_tokens=3 temperature=0.0 top_p=0.95"
    assert ", 3 output tokens, " in second
    assert int(second[1:].split()[0]) > prompt_tokens, "the history went along"


@pytest.mark.slow
def test_quit_ends_a_pipe_early(shell: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\nHello\n"))
    result = shell("chat", "--server", server.address)
    assert (result.status, result.out) == (0, "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_a_person_is_prompted_until_ctrl_d_and_errors_do_not_end_the_chat(
    shell: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["/params max_tokens=0", "Hello", KeyboardInterrupt(), EOFError()])

    def ask(prompt: str) -> str:
        assert prompt == "> "
        line = next(said)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", ask)
    result = shell("chat", "--server", server.address)
    assert result.status == 0
    assert f"dummy:tiny-llama at {server.address}; /help lists commands\n" in result.err
    assert "error: max_tokens must be at least 1, got 0\n" in result.err
    assert "/quit or Ctrl-D ends" in result.err


@pytest.mark.slow
def test_a_person_can_quit(shell: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", lambda prompt: "/quit")
    assert shell("chat", "--server", server.address).status == 0
