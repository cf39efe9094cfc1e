"""One request's stream, checked message by message, and what is left of it at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.v1 import generation_pb2 as pb

_COMPLETE = (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)


@dataclass
class Choice:
    """One answer as far as it has come."""

    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    finish: pb.GenerateFinished | None = None

    def outcome(self) -> tuple[list[int], str, int]:
        """What must be the same when it is asked again."""
        assert self.finish is not None
        return self.tokens, self.text, self.finish.reason


class Transcript:
    """Checks that started comes first, tokens follow one another, and every choice ends once."""

    def __init__(self, request: pb.GenerateRequest, *, ends: frozenset[int]) -> None:
        """Nothing has come yet; ``ends`` are the model's end tokens."""
        self.request = request
        self.started: pb.GenerateStarted | None = None
        self.messages = 0
        count = request.n if request.HasField("n") else 1
        resumed = list(request.resume.token_ids)
        self.choices = [Choice(list(resumed)) for _ in range(count)]
        self._resumed = len(resumed)
        self._ends = frozenset() if request.ignore_eos else ends
        self._prompt_scores = 0
        self._prompt_tokens = 0

    def add(self, message: pb.GenerateResponse) -> None:
        """Takes the next message."""
        self.messages += 1
        match message.WhichOneof("event"):
            case "started":
                assert self.started is None, "started twice"
                self.started = message.started
            case "delta":
                self._delta(message.delta)
            case "finished":
                self._finish(message.finished)
            case other:
                raise AssertionError(f"an event {other}")

    def add_unary(self, response: pb.GenerateUnaryResponse) -> None:
        """Takes a whole answer as if it had been streamed."""
        started = pb.GenerateStarted(
            request_id=response.request_id,
            seed_used=response.seed_used,
            prompt_tokens=response.usage.prompt_tokens,
        )
        self.add(pb.GenerateResponse(started=started))
        self._prompt_scores = len(response.prompt_logprobs)
        for answer in response.choices:
            choice = self.choices[answer.choice]
            # With echo the prompt comes first, in the tokens and in the text.
            echoed = started.prompt_tokens if self.request.echo else 0
            new = list(answer.token_ids[echoed:])
            self._check_tokens(new, answer.logprobs)
            choice.tokens += new
            choice.text = answer.text
            self._finish(answer.finished)

    def _delta(self, delta: pb.GenerateDelta) -> None:
        assert self.started is not None, "tokens before started"
        choice = self.choices[delta.choice]
        assert choice.finish is None, "tokens after the end"
        if delta.prompt:
            assert len(choice.tokens) == self._resumed, "the prompt after the answer has begun"
            if delta.choice == 0:
                self._prompt_scores += len(delta.logprobs)
                self._prompt_tokens += len(delta.token_ids)
            return
        if delta.token_ids:
            assert delta.first_index == len(choice.tokens), "tokens are missing or doubled"
        self._check_tokens(list(delta.token_ids), delta.logprobs)
        choice.tokens += delta.token_ids
        choice.text += delta.text

    def _check_tokens(self, new: list[int], scores: object) -> None:
        request = self.request
        if request.allowed_token_ids:
            assert set(new) <= set(request.allowed_token_ids), "a token that was not allowed"
        assert not set(new) & set(request.banned_token_ids), "a banned token"
        wanted = len(new) if request.HasField("logprobs") else 0
        entries = list(scores)  # pyright: ignore[reportArgumentType]
        assert len(entries) == wanted, f"{len(entries)} log-probabilities for {wanted} tokens"
        assert all(len(entry.top) == request.logprobs for entry in entries)

    def _finish(self, finish: pb.GenerateFinished) -> None:
        assert self.started is not None, "the end before started"
        choice = self.choices[finish.choice]
        assert choice.finish is None, "two ends of one choice"
        choice.finish = finish
        request, output = self.request, len(choice.tokens)
        assert finish.reason in _COMPLETE, f"an OK stream with a choice that ended {finish.reason}"
        assert finish.usage.output_tokens == output, f"{finish.usage} and {output} tokens came"
        assert finish.usage.prompt_tokens == self.started.prompt_tokens
        if finish.reason == pb.FINISH_REASON_LENGTH:
            assert output == request.max_tokens, f"ended at {output} of {request.max_tokens}"
            return
        if finish.stop_string:
            assert finish.stop_string in request.stop
            shown = choice.text.endswith(finish.stop_string)
            assert shown or not request.include_stop, "the stop string was to be kept"
            # The echo of a unary answer is part of its text, and may hold the string.
            assert finish.stop_string not in choice.text or request.include_stop or request.echo
            return
        assert finish.stop_token_id == choice.tokens[-1]
        assert finish.stop_token_id in self._ends | set(request.stop_token_ids)
        assert output >= request.min_tokens, "stopped before min_tokens"

    def end(self) -> None:
        """Checks what must be complete once the stream has ended with OK."""
        assert self.started is not None, "OK without started"
        assert all(choice.finish is not None for choice in self.choices), "a choice never ended"
        if self.request.HasField("prompt_logprobs"):
            assert self._prompt_scores == self.started.prompt_tokens, "prompt scores are missing"
        if self.request.truncate_prompt_tokens:
            assert self.started.prompt_tokens <= self.request.truncate_prompt_tokens
