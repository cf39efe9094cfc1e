"""Grammars that answers obey, compiled by ``llguidance`` on threads of their own.

    Grammar (as sent) --GrammarCompiler.compile--> CompiledGrammar --matcher--> the engine

A grammar comes from anybody, so everything about it has a limit: its text, the time to wait for it,
the work that compiling and each later token may take. Compiling recurses along the text, a few KiB
of stack for each level, and a stack that overflows takes the process along: the threads here have
256 MiB, ten times of what the deepest text within ``MAX_GRAMMAR_CHARS`` was measured to need.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from queue import Full, Queue
from typing import Any, assert_never

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from jaxserve.errors import InvalidRequestError, RetryableError
from jaxserve.frontend.grammar import Grammar
from jaxserve.frontend.parsing import ANSWER
from jaxserve.frontend.tokenizer import Tokenizer

MAX_GRAMMAR_CHARS = 65_536
MAX_CHOICE_STRINGS = 1024
COMPILE_TIMEOUT_S = 5.0
"""Of one request's wait. The limits of llguidance end a compilation after a second or two."""
COMPILE_THREADS = 2
MAX_COMPILING = 64
"""Grammars that wait for a thread."""
KEPT_GRAMMARS = 128
"""Compiled ones, least lately used first to go; 170 KiB each (``bench/schemas.py``)."""
STACK_BYTES = 256 << 20
"""Reserved, not used: pages of it come into being when they are touched."""
MAX_VISITED = 4
"""States behind markers that are looked at when a grammar is compiled."""
LEXER_FUEL, STEP_ITEMS = 100_000, 20_000
"""Of one mask; every one of the 3,333 schemas that ``bench/schemas.py`` compiles stays below."""
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One space behind separators, as Python writes JSON and models have read it most. With any
whitespace, a model of small talent may write nothing else until its tokens are used up."""


class CompiledGrammar:
    """A ``Constraint`` of the engine."""

    def __init__(self, prototype: LLMatcher) -> None:
        """Copies ``prototype`` for every choice; a copy takes 2 µs."""
        self._prototype = prototype

    def matcher(self, tokens: Sequence[int] = ()) -> GrammarMatcher:
        """Returns a new matcher behind ``tokens``.

        Raises:
            InvalidRequestError: the grammar does not begin so, or has ended there.
        """
        matcher = GrammarMatcher(self._prototype.deep_copy())
        for place, token in enumerate(tokens):
            if matcher.complete or not matcher.accept(token):
                raise InvalidRequestError(
                    f"resume does not obey the grammar at its token {place}, which is {token}; "
                    "send the tokens of an answer to the same request",
                    field="resume",
                )
        if tokens and matcher.complete:
            raise InvalidRequestError(
                "resume is all that the grammar has; nothing is left to generate", field="resume"
            )
        return matcher


class GrammarMatcher:
    """A ``Matcher`` of the engine."""

    __slots__ = ("_matcher", "error")

    def __init__(self, matcher: LLMatcher) -> None:
        """Takes over ``matcher``."""
        self._matcher = matcher
        self.error = ""
        """Why it cannot go on; empty while it can."""

    @property
    def complete(self) -> bool:
        """True when nothing but the end may follow."""
        return self._matcher.is_stopped()

    def fill(self, words: np.ndarray) -> None:
        """Writes which tokens may come next; none when a limit has been passed."""
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            self._fail(words)

    def accept(self, token_id: int) -> bool:
        """Goes on by a token; False when the grammar does not have it."""
        accepted = self._matcher.consume_token(token_id)
        if not accepted:
            self.error = _reason(self._matcher.get_error())
        return accepted

    def _fail(self, words: np.ndarray) -> None:
        self.error = _reason(self._matcher.get_error())
        words[:] = 0


class GrammarCompiler:
    """Compiles grammars for one model. Any thread; close it to end its own."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eager: bool = False) -> None:
        """Starts the threads.

        Args:
            tokenizer: of the model.
            vocab_size: tokens that the model can choose.
            eager: reads the tokenizer at once, on a thread, and not when the first grammar comes.
                Half of it is one call that lets no other Python run: 0.8 s for 150,000 tokens.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._limits = LLParserLimits(
            step_lexer_fuel=LEXER_FUEL, step_max_items=STEP_ITEMS, verbose_errors=False
        )
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._jobs: Queue[tuple[Grammar, Future[CompiledGrammar]] | None] = Queue(MAX_COMPILING)
        self._threads = _start_threads(self._work)
        if eager:
            self._jobs.put((Grammar("json_object"), Future()))

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Returns what the engine needs; waits for at most ``COMPILE_TIMEOUT_S``.

        Raises:
            InvalidRequestError: it is too large, not well formed, not supported, allows no answer,
                or takes too long.
            RetryableError: too many wait to be compiled.
        """
        made = self._begin(grammar)
        with _refusing(grammar.field):
            try:
                return made.result(COMPILE_TIMEOUT_S)
            finally:
                made.cancel()

    async def compile_async(self, grammar: Grammar) -> CompiledGrammar:
        """``compile`` for event loops: no thread waits.

        Raises:
            InvalidRequestError: see ``compile``.
            RetryableError: see ``compile``.
        """
        made = self._begin(grammar)
        with _refusing(grammar.field):
            return await asyncio.wait_for(asyncio.wrap_future(made), COMPILE_TIMEOUT_S)

    def _begin(self, grammar: Grammar) -> Future[CompiledGrammar]:
        made: Future[CompiledGrammar] = Future()
        with self._lock:
            if (kept := self._kept.get(grammar)) is not None:
                self._kept.move_to_end(grammar)
                made.set_result(kept)
                return made
        chars = len(grammar.text) + len(grammar.frame)
        if chars > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"{grammar.field} has {chars} characters and the limit is "
                f"{MAX_GRAMMAR_CHARS}; send a shorter one",
                field=grammar.field,
            )
        try:
            self._jobs.put_nowait((grammar, made))
        except Full:
            raise RetryableError(
                f"{MAX_COMPILING} grammars wait to be compiled already; retry in about a second",
                retry_after_s=1.0,
            ) from None
        return made

    def close(self) -> None:
        """Ends the threads when what they compile is done. Safe to call again."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads = []

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            grammar, made = job
            if not made.set_running_or_notify_cancel():
                continue  # Whoever asked has given up.
            try:
                compiled = self._compile(grammar)
            except BaseException as error:  # A panic of llguidance is no Exception.
                refused = error if isinstance(error, ValueError) else ValueError(str(error))
                made.set_exception(refused)
            else:
                with self._lock:
                    self._kept[grammar] = compiled
                    while len(self._kept) > KEPT_GRAMMARS:
                        self._kept.popitem(last=False)
                made.set_result(compiled)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        source = source_of(grammar)
        matcher = LLMatcher(self._ll_tokenizer, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ValueError(_reason(matcher.get_error()))
        first = GrammarMatcher(matcher)
        words = np.zeros(-(-self._vocab_size // 32), np.int32)
        first.fill(words)
        if first.error or not words.any():
            raise ValueError(first.error or "it allows no answer")
        self._visit(matcher, words)
        return CompiledGrammar(matcher)

    def _visit(self, matcher: LLMatcher, words: np.ndarray) -> None:
        """Looks behind the markers that may come first, as ``fill`` has done at the beginning.

        What a state of the lexer allows takes milliseconds of a large vocabulary to find out, once:
        copies of a matcher know what it knows.
        """
        marks = (words[self._markers // 32] >> (self._markers % 32)) & 1
        behind = np.zeros_like(words)
        for token in self._markers[marks.astype(bool)][:MAX_VISITED].tolist():
            if matcher.consume_token(token):
                GrammarMatcher(matcher).fill(behind)
                matcher.rollback(1)

    @cached_property
    def _markers(self) -> np.ndarray:
        """Int [n], the added tokens that end no answer."""
        added = set(self._tokenizer.fast.get_added_tokens_decoder()) - self._tokenizer.eos_ids
        return np.asarray(sorted(each for each in added if each < self._vocab_size), np.int64)

    @property
    def _ll_tokenizer(self) -> LLTokenizer:
        with self._reading:
            return self._read_tokenizer

    @cached_property
    def _read_tokenizer(self) -> LLTokenizer:
        ends = sorted(number for number in self._tokenizer.eos_ids if number < self._vocab_size)
        if not ends:
            raise ValueError("this model has no end token, so no grammar can end an answer")
        words = _Words(self._tokenizer, self._vocab_size)
        return LLTokenizer(TokenizerWrapper(words), n_vocab=self._vocab_size, eos_token=ends)


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """Tells of what went wrong under the name that the client knows."""
    try:
        yield
    except TimeoutError:
        raise InvalidRequestError(
            f"{field} takes more than {COMPILE_TIMEOUT_S:g} s to compile; send a simpler one",
            field=field,
        ) from None
    except ValueError as error:
        raise InvalidRequestError(
            f"{field} cannot be used: {error}; correct it or send a simpler one", field=field
        ) from None


def source_of(grammar: Grammar) -> str:
    """Returns a grammar in llguidance's own form.

    Raises:
        ValueError: it is not well formed.
    """
    match grammar.kind:
        case "json_schema":
            schema = _json(grammar.text)
            if not isinstance(schema, dict):
                raise ValueError("it is no JSON object")
            source = _of_schema(schema)
        case "json_object":
            source = _of_schema({"type": "object"})
        case "regex":
            source = LLMatcher.grammar_from_regex(grammar.text)
        case "grammar":
            is_gbnf = "::=" in grammar.text
            lark = gbnf_to_lark(grammar.text) if is_gbnf else grammar.text
            source = json.dumps({"grammars": [{"lark_grammar": lark}]})
        case "choices":
            source = LLMatcher.grammar_from_regex("|".join(map(_literal, _choices(grammar.text))))
        case _:
            assert_never(grammar.kind)
    if not grammar.frame:
        return source
    inside = {**json.loads(source)["grammars"][0], "name": ANSWER}
    return json.dumps({"grammars": [{"lark_grammar": grammar.frame}, inside]})


def _of_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema({**schema, "x-guidance": JSON_OPTIONS})


def _choices(text: str) -> list[str]:
    choices = _json(text)
    if not isinstance(choices, list) or not all(isinstance(each, str) for each in choices):
        raise ValueError("it is no list of strings")
    if not choices or not all(choices):
        raise ValueError("it is empty or holds an empty string")
    if len(choices) > MAX_CHOICE_STRINGS:
        raise ValueError(f"it has {len(choices)} strings and the limit is {MAX_CHOICE_STRINGS}")
    return choices


def _literal(text: str) -> str:
    """A regular expression of one text. Python's own escapes spaces, which Rust refuses."""
    return "".join(f"\\{char}" if char in r"\.+*?()|[]{}^$#&-~" else char for char in text)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({str(error)[:80]})") from None


def _reason(error: str) -> str:
    """What llguidance says in a line: what follows is the state of its parser.

    Of a regular expression the fault is named at the end.
    """
    if "NoExtensionBias" in error:
        return "it allows no answer"
    first, *more = error.split("\n")
    named = [line.removeprefix("error: ") for line in more if line.startswith("error: ")]
    return " ".join([first[:200], *named[:1]])[:300].strip() or "no reason is given"


def _start_threads(work: Callable[[], None]) -> list[threading.Thread]:
    threads = [
        threading.Thread(target=work, name="jaxserve-grammar", daemon=True)
        for _ in range(COMPILE_THREADS)
    ]
    before = threading.stack_size(STACK_BYTES)
    try:
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(before)
    return threads


LEAD = "\x02"
"""A character that no text begins with and no token joins with what follows."""


class _Words:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokens = [tokenizer.token_bytes(number) for number in range(vocab_size)]
        self.special_token_ids = [n for n in sorted(tokenizer.special_ids) if n < vocab_size]
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = min(tokenizer.eos_ids)
        self._tokenizer = tokenizer
        added = tokenizer.fast.get_added_tokens_decoder()
        special = (added[number].content for number in tokenizer.special_ids if number in added)
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Llama 2's tokenizer and its kin write a space in front of whatever they are given.
        written = b"".join(map(tokenizer.token_bytes, self._encode("a")))
        prepends = written.startswith(b" ")
        self._lead = LEAD if prepends else ""
        self._lead_tokens = len(self._encode(LEAD)) if prepends else 0

    def __call__(self, text: bytes | str) -> list[int]:
        """Returns tokens of which the bytes are exactly those of ``text``.

        The text of a special token is letters here: a grammar that asks for the token says so.
        """
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        cuts = [found.start() + 1 for found in self._special.finditer(plain)]
        pieces = [plain[start:end] for start, end in pairwise([0, *cuts, len(plain)])]
        return [
            token
            for piece in pieces
            for token in self._encode(self._lead + piece)[self._lead_tokens :]
        ]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
