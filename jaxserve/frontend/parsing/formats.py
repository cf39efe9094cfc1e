"""How a model family writes its reasoning and its tool calls, as data.

There are three shapes of calls, and a family is one of them (or two that share a marker) with its
own markers filled in. What is said here drives both directions: ``calls.py`` reads a shape and
``grammar.py`` writes it. Between markers and JSON any white space is read; ``padding`` and
``between`` say what is written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonCalls:
    """Objects with name and arguments in them, one or a list: ``{"name": ..., "arguments": ...}``.

    All of these are read, whatever a family writes: one object, several, a list of them.
    """

    begin: str
    """Opens one call or a list of them."""
    end: str = ""
    """Closes what ``begin`` opened; empty where nothing does."""
    bare: bool = False
    """An answer may also begin with the JSON itself, without ``begin``, and that is written. Such
    an object needs arguments: any JSON answer with a name in it would be a call otherwise."""
    is_list: bool = False
    """Writes all calls as one list. Otherwise each call is an object with its own markers."""
    name_key: str = "name"
    argument_keys: tuple[str, ...] = ("arguments", "parameters")
    """All are read, the first is written."""
    id_key: str = ""
    """A member with a string that is written in front of the name; read and dropped."""
    padding: str = ""
    """Written between the markers and the JSON."""
    between: str = "\n"
    """Written between calls that are no list."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that open and close."""
        return tuple(filter(None, (self.begin, self.end)))


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedCalls:
    """The name as text, then the arguments as a JSON object."""

    begin: str = ""
    """Opens a section of calls; empty where calls stand alone."""
    end: str = ""
    call_begin: str
    head: tuple[str, str]
    """Patterns for what stands before and behind the name, up to ``separator``."""
    written_head: tuple[str, str] = ("", "")
    """The same as text, for writing."""
    head_markers: tuple[str, ...] = ()
    """Markers that may stand in the head."""
    is_numbered: bool = False
    """Calls are numbered behind the written head."""
    separator: str
    """Ends the head."""
    call_end: tuple[str, ...] = ()
    """What follows the arguments, in this order."""
    padding: str = ""
    """Written around the arguments."""
    between: str = ""
    """Written between calls."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that open, part and close."""
        head = (*self.head_markers, self.separator)
        texts = (self.begin, self.call_begin, *head, *self.call_end, self.end)
        return tuple(filter(None, texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedCalls:
    """The name and each argument in tags of their own; values are text, or JSON."""

    begin: str
    end: str = ""
    """Closes ``begin`` behind ``call_end``; empty where ``call_end`` does."""
    name_open: str = ""
    name_close: str = ""
    """Ends the name; empty where the next tag does."""
    key_open: str
    key_close: str
    value_open: str = ""
    value_close: str
    call_end: str
    padding: str = ""
    """Written between tags."""
    value_lines: bool = False
    """A value stands on lines of its own: one line end on each side is not part of it."""
    between: str = "\n"
    """Written between calls."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All tags but bare punctuation."""
        name = (self.name_open, self.name_close)
        value = (self.key_open, self.key_close, self.value_open, self.value_close)
        tags = (self.begin, *name, *value, self.call_end, self.end)
        return tuple(tag for tag in tags if len(tag) > 1)


CallShape = JsonCalls | NamedCalls | TaggedCalls


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """One family's way of writing an answer."""

    name: str
    reasoning: tuple[str, str] | None = None
    """What opens and closes the model's thoughts. White space around these is not kept."""
    tools: tuple[CallShape, ...] = ()
    """Shapes that are read; the first is written. Several of them share the first marker."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All literal texts that must reach the parser, each once."""
        shapes = [marker for shape in self.tools for marker in shape.markers]
        return tuple(dict.fromkeys([*(self.reasoning or ()), *shapes]))
