"""Checks JSON that arrives character by character (RFC 8259, nothing more lenient).

Says at every character what may come next and how deep it is, which is what a reader of tool calls
needs to find the names and the ends. Makes no values: ``json.loads`` does that, once text is whole.
"""

from __future__ import annotations

from enum import Enum, auto

MAX_DEPTH = 64
"""Nested arrays and objects. Real arguments have a handful; deeper text is taken for noise."""
SPACE = " \t\n\r"
HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
ESCAPES = frozenset('"\\/bfnrt')
WORDS = {"t": "rue", "f": "alse", "n": "ull"}
# Where a number stands -> which characters lead where. Only the places in NUMBER_ENDS may be last.
_DIGITS, _NONZERO = "0123456789", "123456789"
NUMBERS: dict[str, dict[str, str]] = {
    "minus": {"0": "zero"} | dict.fromkeys(_NONZERO, "whole"),
    "zero": {".": "point", "e": "e", "E": "e"},
    "whole": {".": "point", "e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "whole"),
    "point": dict.fromkeys(_DIGITS, "part"),
    "part": {"e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "part"),
    "e": {"+": "sign", "-": "sign"} | dict.fromkeys(_DIGITS, "power"),
    "sign": dict.fromkeys(_DIGITS, "power"),
    "power": dict.fromkeys(_DIGITS, "power"),
}
NUMBER_STARTS = {"-": "minus", "0": "zero"} | dict.fromkeys(_NONZERO, "whole")
NUMBER_ENDS = frozenset({"zero", "whole", "part", "power"})


class NotJsonError(ValueError):
    """The last character cannot stand where it does. Never leaves the parser."""


class Place(Enum):
    """Where the next character stands."""

    VALUE = auto()
    """A value begins."""
    FIRST_ITEM = auto()
    """Behind ``[``: a value begins, or ``]``."""
    FIRST_KEY = auto()
    """Behind ``{``: a key begins, or ``}``."""
    KEY = auto()
    COLON = auto()
    AFTER = auto()
    """Behind a value: a comma, or what closes the array or object."""
    STRING = auto()
    ESCAPE = auto()
    UNICODE = auto()
    NUMBER = auto()
    WORD = auto()
    """In ``true``, ``false`` or ``null``."""


IN_STRING = frozenset({Place.STRING, Place.ESCAPE, Place.UNICODE})


class JsonScanner:
    """One JSON value. Constant work a character."""

    def __init__(self) -> None:
        self.place = Place.VALUE
        self._closers: list[str] = []
        self._after_string = Place.AFTER
        self._rest = ""
        """What a word still lacks, or where a number stands."""
        self._hex_digits = 0

    @property
    def depth(self) -> int:
        """Arrays and objects that are open."""
        return len(self._closers)

    @property
    def complete(self) -> bool:
        """Whether the value could end here."""
        if self._closers:
            return False
        ended = self.place is Place.NUMBER and self._rest in NUMBER_ENDS
        return ended or self.place is Place.AFTER

    def push(self, char: str) -> None:
        """Takes the next character.

        Raises:
            NotJsonError: it cannot stand here, or opens more than ``MAX_DEPTH``.
        """
        place = self.place
        if place is Place.STRING:
            if char == '"':
                self.place = self._after_string
            elif char == "\\":
                self.place = Place.ESCAPE
            elif char < " ":
                raise NotJsonError
        elif place is Place.ESCAPE:
            self._escape(char)
        elif place is Place.UNICODE:
            self._unicode(char)
        elif place is Place.NUMBER:
            self._number(char)
        elif place is Place.WORD:
            if char != self._rest[0]:
                raise NotJsonError
            self._rest = self._rest[1:]
            if not self._rest:
                self.place = Place.AFTER
        elif char not in SPACE:
            self._structure(char)

    def _structure(self, char: str) -> None:
        place = self.place
        if char in "]}":
            self._close(char)
        elif place in (Place.VALUE, Place.FIRST_ITEM):
            self._begin(char)
        elif place in (Place.KEY, Place.FIRST_KEY) and char == '"':
            self.place, self._after_string = Place.STRING, Place.COLON
        elif place is Place.COLON and char == ":":
            self.place = Place.VALUE
        elif place is Place.AFTER and char == "," and self._closers:
            self.place = Place.KEY if self._closers[-1] == "}" else Place.VALUE
        else:
            raise NotJsonError

    def _begin(self, char: str) -> None:
        if char == '"':
            self.place, self._after_string = Place.STRING, Place.AFTER
        elif char in "[{":
            if self.depth == MAX_DEPTH:
                raise NotJsonError
            self._closers.append("]" if char == "[" else "}")
            self.place = Place.FIRST_ITEM if char == "[" else Place.FIRST_KEY
        elif char in NUMBER_STARTS:
            self.place, self._rest = Place.NUMBER, NUMBER_STARTS[char]
        elif char in WORDS:
            self.place, self._rest = Place.WORD, WORDS[char]
        else:
            raise NotJsonError

    def _close(self, char: str) -> None:
        empty = Place.FIRST_ITEM if char == "]" else Place.FIRST_KEY
        if self.place not in (Place.AFTER, empty) or self._closers[-1:] != [char]:
            raise NotJsonError
        self._closers.pop()
        self.place = Place.AFTER

    def _escape(self, char: str) -> None:
        if char == "u":
            self.place, self._hex_digits = Place.UNICODE, 0
        elif char in ESCAPES:
            self.place = Place.STRING
        else:
            raise NotJsonError

    def _unicode(self, char: str) -> None:
        if char not in HEX_DIGITS:
            raise NotJsonError
        self._hex_digits += 1
        if self._hex_digits == 4:
            self.place = Place.STRING

    def _number(self, char: str) -> None:
        following = NUMBERS[self._rest].get(char)
        if following is not None:
            self._rest = following
        elif self._rest in NUMBER_ENDS:
            # A number ends with what comes behind it.
            self.place = Place.AFTER
            if char not in SPACE:
                self._structure(char)
        else:
            raise NotJsonError


def is_json(text: str) -> bool:
    """Returns whether ``text`` is one whole JSON value."""
    scanner = JsonScanner()
    try:
        for char in text:
            scanner.push(char)
    except NotJsonError:
        return False
    return scanner.complete
