"""Reads tool calls character by character, in any of the three shapes of ``formats.py``.

A shape is read by a generator that is sent one character at a time: its code is the grammar,
written down in order, and where it waits is the state. It writes to the answer's parts as soon as
something is certain. Characters that are not yet accounted for are held; ``NotACallError`` means
that the last one cannot stand where it does, and what is held is then content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import Enum, auto

from jaxserve.frontend.parsing.formats import CallShape, JsonCalls, NamedCalls, TaggedCalls
from jaxserve.frontend.parsing.json_scanner import (
    IN_STRING,
    SPACE,
    JsonScanner,
    NotJsonError,
    Place,
)
from jaxserve.frontend.parsing.parts import PartList
from jaxserve.frontend.parsing.reading import (
    MAX_HELD_CHARS,
    MAX_NAME_CHARS,
    NotACallError,
    Reader,
    Reading,
    Tools,
    automaton,
)
from jaxserve.frontend.parsing.values import STRING, json_string, parameter_types, typed_json

NAME = re.compile(r'[^\s<>\[\]{}"]+')
"""What can be a name where none are given and no quotes stand around it."""

BARE_KEYS = ("type", "id")
"""First keys of a call without a marker, beside name and arguments. Other objects are answers in
JSON, which are not to be held up to their end."""


class Progress(Enum):
    """What a character did."""

    MORE = auto()
    DONE = auto()
    """It ended the calls."""
    REJECTED = auto()
    """It does not belong to the calls and was not taken."""


class CallReader(Reading):
    """Reads the calls behind one opening marker."""

    def __init__(
        self, shapes: Sequence[CallShape], opening: str, tools: Tools, parts: PartList
    ) -> None:
        """Begins behind the marker.

        Args:
            shapes: those that begin with this marker.
            opening: the marker's text, empty when the calls begin without one.
            tools: schemas by name; empty allows every name.
            parts: is written to.
        """
        super().__init__(opening, tools, parts)
        self.is_bare = not opening
        """The calls began without a marker."""
        self._steps = self._read(shapes)
        next(self._steps)

    def push(self, char: str) -> Progress:
        """Takes the next character. Not to be called again after DONE or REJECTED."""
        self.held.append(char)
        try:
            if len(self.held) > MAX_HELD_CHARS:
                raise NotACallError
            self._steps.send(char)
        except StopIteration:
            return Progress.DONE
        except (NotACallError, NotJsonError):
            self.held.pop()
            return Progress.REJECTED
        return Progress.MORE

    def _read(self, shapes: Sequence[CallShape]) -> Reader[None]:
        char = yield from self._skip_space()
        for shape in shapes:
            if isinstance(shape, JsonCalls) and char in "[{":
                return (yield from self._json_calls(shape, char))
            if isinstance(shape, NamedCalls) and char not in "[{":
                return (yield from self._named_calls(shape, char))
            if isinstance(shape, TaggedCalls):
                return (yield from self._tagged_calls(shape, char))
        raise NotACallError

    # JSON objects with the name in them.

    def _json_calls(self, shape: JsonCalls, char: str) -> Reader[None]:
        in_list = char == "["
        if in_list:
            char = yield from self._skip_space()
        while True:
            if char != "{":
                raise NotACallError
            char = yield from self._object(shape)
            char = char or (yield from self._skip_space())
            if in_list and char == "]":
                in_list = False
                self.held.clear()
                if not shape.end:
                    return None
                char = yield from self._skip_space()
            elif in_list:
                if char != ",":
                    raise NotACallError
                char = yield from self._skip_space()
            elif char == ";" and not shape.end:
                char = yield from self._skip_space()
            if shape.end and char == shape.end[0] and not in_list:
                yield from self._choice((shape.end,), char)
                return self.held.clear()

    def _object(self, shape: JsonCalls) -> Reader[str]:
        """Reads one call behind its brace.

        Returns:
            Empty, or a character behind the object that has been read too: a call is complete with
            its arguments, so that the last brace, which weak models forget, may be missing.
        """
        scanner = JsonScanner()
        scanner.push("{")
        members = _Members(shape, bare=self.is_bare)
        ended = False
        while scanner.depth:
            char = yield
            try:
                place = scanner.place
                scanner.push(char)
            except NotJsonError:
                if ended and all(held in SPACE for held in self.held[:-1]):
                    return char
                raise
            if not ended and scanner.depth == 2 and members.begins_arguments(place, char):
                if members.name is None:
                    members.arguments = yield from self._held_arguments(scanner)
                else:
                    self._start(members.name)
                    yield from self._arguments(scanner)
                    ended = True
            elif scanner.depth == 1 and not ended:
                members.push(place, scanner.place, char)
                if members.name is not None:
                    self._check(members.name)
                    if members.arguments:
                        self._whole_call(members.name, members.arguments)
                        ended = True
        if not ended:
            if members.name is None or self.is_bare:
                raise NotACallError
            self._whole_call(members.name, "{}")
        self.held.clear()
        return ""

    def _held_arguments(self, scanner: JsonScanner) -> Reader[str]:
        """Reads arguments whose name is not known yet."""
        first = len(self.held) - 1
        while scanner.depth > 1:
            scanner.push((yield))
        return "".join(self.held[first:])

    # A name as text, then JSON.

    def _named_calls(self, shape: NamedCalls, char: str) -> Reader[None]:
        before, behind = shape.head
        pattern = re.compile(rf"\s*{before}(?P<name>{NAME.pattern}?){behind}\s*")
        if shape.begin:
            yield from self._choice((shape.call_begin,), char)
            char = ""
        while True:
            head, _ = yield from self._until((shape.separator,), char)
            found = pattern.fullmatch(head)
            if found is None:
                raise NotACallError
            name = found["name"]
            self._check(name)
            scanner = JsonScanner()
            brace = yield from self._skip_space()
            if brace != "{":
                raise NotACallError
            scanner.push(brace)
            self._start(name)
            yield from self._arguments(scanner, depth=0)
            for text in shape.call_end:
                yield from self._choice((text,))
            self.held.clear()
            if not shape.begin:
                return
            if (yield from self._choice((shape.call_begin, shape.end))) == shape.end:
                return self.held.clear()
            char = ""

    # Tags around name and values.

    def _tagged_calls(self, shape: TaggedCalls, char: str) -> Reader[None]:
        tags = (shape.key_open, shape.call_end)
        if shape.name_open:
            yield from self._choice((shape.name_open,), char)
            name, _ = yield from self._until((shape.name_close,))
            tag = yield from self._choice(tags)
        else:
            name, tag = yield from self._until(tags, char)
        name = name.strip()
        if NAME.fullmatch(name) is None:
            raise NotACallError
        self._check(name)
        self._start(name)
        self._argument("{")
        separator = ""
        while tag == shape.key_open:
            key, _ = yield from self._until((shape.key_close,))
            if shape.value_open:
                yield from self._choice((shape.value_open,))
            types = parameter_types(self._tools.get(name), key.strip())
            self._argument(f'{separator}"{json_string(key.strip())}": ')
            yield from self._value(shape, types)
            separator = ", "
            tag = yield from self._choice(tags)
        self._argument("}")
        self._parts.end_call()
        if shape.end:
            yield from self._choice((shape.end,))
            self.held.clear()

    def _value(self, shape: TaggedCalls, types: frozenset[str]) -> Reader[None]:
        """Reads a value up to its tag; strings are passed on as they arrive."""
        streams = types == STRING
        closing = (shape.value_close,)
        if shape.value_lines:
            closing += ("\n" + shape.value_close,)
        states = automaton(closing)
        if streams:
            self._argument('"')
        whole: list[str] = []
        state, text = 0, ""
        at_start = shape.value_lines
        while True:
            char = yield
            if at_start:
                at_start = False
                if char == "\n":
                    continue
            state = states.step(state, char)
            text += char
            if states.found[state]:
                text = text[: len(text) - states.found[state]]
                break
            safe = len(text) - states.depth[state]
            if streams and safe:
                self._argument(json_string(text[:safe]))
                self.held.extend(text[safe:])
            elif safe:
                whole.append(text[:safe])
            text = text[safe:]
        self._argument(
            json_string(text) + '"' if streams else typed_json("".join([*whole, text]), types)
        )


class _Members:
    """Follows the members of a call's object until name and arguments are found."""

    def __init__(self, shape: JsonCalls, *, bare: bool) -> None:
        self._name_key = shape.name_key
        self._argument_keys = shape.argument_keys
        known = (shape.name_key, *shape.argument_keys, *BARE_KEYS)
        self._first_keys = known if bare else ()
        """What the first key has to be one of, if anything."""
        self._key = ""
        self._word: list[str] | None = None
        """Characters of the string that is being read, where it matters."""
        self.name: str | None = None
        self.arguments = ""

    def begins_arguments(self, place: Place, char: str) -> bool:
        """Whether the object or list that a character opened in ``place`` is the arguments."""
        if place is not Place.VALUE or char not in "[{":
            return False
        is_arguments = self._key in self._argument_keys and not self.arguments
        if self._key == self._name_key or (is_arguments and char == "["):
            raise NotACallError
        return is_arguments

    def push(self, place: Place, after: Place, char: str) -> None:
        """Takes a character that stands directly in the object, between two places."""
        if place in IN_STRING:
            if self._word is not None:
                self._word.append(char)
                if len(self._word) > MAX_NAME_CHARS:
                    raise NotACallError
                self._end_word(after)
        elif place is Place.VALUE and char not in SPACE:
            is_name = self._key == self._name_key
            # The arguments are an object, and the name is a string: other values are no call's.
            if self._key in self._argument_keys or (is_name and char != '"'):
                raise NotACallError
            self._word = [char] if is_name else None
        elif after is Place.STRING:
            self._word = [char]

    def _end_word(self, after: Place) -> None:
        if after not in IN_STRING:
            word = json.loads("".join(self._word or ()))
            self._word = None
            if after is Place.COLON:
                if not self._key and self._first_keys and word not in self._first_keys:
                    raise NotACallError
                self._key = word
            elif self.name is None:
                self.name = word
