"""Regular expressions of tokenizer files: how much work one can make, told from its text before anything matches with it.

The tokenizers package matches by backtracking (Oniguruma): where a part fails, all ways to match what stands before it are
tried, at every place of the text. So a pattern is read here, in the part of the syntax that tokenizers use, and refused where
there are too many ways, or for what is not read. Repetitions of repetitions have a number of ways that doubles with each
character; two without end before a part that can fail take a minute over a page of text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MAX_LENGTH = 8_192  # characters; the longest in use lists the letters of many alphabets
MAX_DEPTH = 16  # groups inside groups
# Ways that are tried in vain at one place of a text, as bits: those of one repetition without end, and a few beside.
MAX_TRIED = 16.0
_ENDLESS = 10.0  # bits of one repetition without end: some 1000 characters
# Written otherwise than the rules below allow, in use, and tried: nothing follows what could be tried again.
_KNOWN = frozenset(
    {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+"
        r"[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",  # EXAONE
    }
)
_GROUP = re.compile(r"\?(?:[im]*(?:-[im]+)?:|=|!|<=|<!|>)")
_AROUND = ("?=", "?!", "?<=", "?<!")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[A-Za-z_ ]+\}|x[0-9A-Fa-f]{1,2}|x\{[0-9A-Fa-f]{1,6}\}|u[0-9A-Fa-f]{4}|[sSdDwWhHrntvfaebBAzZG]|[^A-Za-z0-9])"
)
_COUNT = re.compile(r"\{(\d{1,4})(?:(,)(\d{0,4}))?\}|\{,(\d{1,4})\}")
_WITHOUT_WIDTH = frozenset([r"\b", r"\B", r"\A", r"\z", r"\Z", r"\G"])


class PatternRefused(ValueError):
    """A pattern that is not read here or could make too much work; the message says which part."""


@dataclass(frozen=True)
class Part:
    """What one part of a pattern matches.

    Attributes:
        least: How many characters at the least.
        ways: How many ways there are to match it, as bits. All are tried where what follows fails.
        tried: How many are tried although nothing follows that can fail, as bits.
        sure: True if it cannot fail.
    """

    least: int
    ways: float = 0
    tried: float = 0
    sure: bool = False


def least_match(pattern: str) -> int:
    """How many characters a pattern matches at the least.

    Args:
        pattern: A regular expression as tokenizer files hold it, in Oniguruma's syntax.

    Raises:
        PatternRefused: It is too long, uses what no tokenizer needs (back references, calls, conditions, code), or could
            be matched in so many ways that one text keeps it busy.
    """
    if pattern in _KNOWN:
        return 1
    if len(pattern) > MAX_LENGTH:
        raise PatternRefused(f"a pattern of {len(pattern):,} characters; at most {MAX_LENGTH:,} are read")
    reader = _Reader(pattern)
    found = reader.alternatives(0)
    if reader.place < len(pattern):
        raise PatternRefused(f"a bracket without its partner at character {reader.place}")
    if found.tried > MAX_TRIED:
        raise PatternRefused("too many repetitions stand before what can fail")
    return found.least


class _Reader:
    """Reads a pattern from left to right; ``place`` is the next character."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def alternatives(self, depth: int) -> Part:
        """Parts between ``|``, up to the end or a closing bracket."""
        if depth > MAX_DEPTH:
            raise PatternRefused(f"groups nested more than {MAX_DEPTH} deep")
        found = [self._sequence(depth)]
        while self._takes("|"):
            found.append(self._sequence(depth))
        if len(found) == 1:
            return found[0]
        more = math.log2(len(found))
        return Part(
            min(part.least for part in found),
            max(part.ways for part in found) + more,
            max(part.tried for part in found) + more,
            any(part.sure for part in found),
        )

    def _sequence(self, depth: int) -> Part:
        """Parts that follow one another."""
        parts = []
        while self.place < len(self.text) and self.text[self.place] not in "|)":
            parts.append(self._repeated(self._atom(depth)))
        # What cannot fail sends nothing back to what stands before it, so only parts before the last that can fail count.
        last = max((place for place, part in enumerate(parts) if not part.sure), default=-1)
        before = sum(part.ways for part in parts[:last]) + parts[last].tried if last >= 0 else 0.0
        tried = max([before, *(part.tried for part in parts[last + 1 :])])
        return Part(sum(part.least for part in parts), sum(part.ways for part in parts), tried, last < 0)

    def _atom(self, depth: int) -> Part:
        """A character, a class, or a group."""
        start = self.place
        letter = self.text[start]
        if letter == "(":
            return self._group(depth)
        if letter == "[":
            self._class(0)
        elif letter == "\\":
            escape = _ESCAPE.match(self.text, start)
            if escape is None:
                raise PatternRefused(f"{self.text[start : start + 4]!r}, which is not read here")
            self.place = escape.end()
            if escape[0] in _WITHOUT_WIDTH:
                return Part(0)
        elif letter in "*+?":
            raise PatternRefused(f"a repetition of nothing at character {start}")
        else:
            self.place += 1
            if letter in "^$":
                return Part(0)
        return Part(1)

    def _group(self, depth: int) -> Part:
        self.place += 1
        kind = ""
        if self.text.startswith(("?", "*"), self.place):
            opened = _GROUP.match(self.text, self.place)
            if opened is None:
                raise PatternRefused(f"the group '({self.text[self.place : self.place + 4]}', which is not read here")
            kind, self.place = opened[0], opened.end()
        part = self.alternatives(depth + 1)
        if not self._takes(")"):
            raise PatternRefused("a bracket without its partner")
        if kind not in _AROUND:
            return part
        # What was found by looking around is not looked for in another way where what follows fails. But it is gone through,
        # as far as the repetitions in it reach, each time that one is there.
        return Part(0, max(part.ways, part.tried), part.tried)

    def _class(self, depth: int) -> None:
        """Goes past a class of characters, which may hold others."""
        if depth > MAX_DEPTH:
            raise PatternRefused(f"classes nested more than {MAX_DEPTH} deep")
        self.place += 1
        self._takes("^")
        first = True
        while self.place < len(self.text):
            letter = self.text[self.place]
            if letter == "]" and not first:
                self.place += 1
                return
            if letter == "[":
                self._class(depth + 1)
            elif letter == "\\":
                self.place += 2
            else:
                self.place += 1
            first = False
        raise PatternRefused("a class of characters without its end")

    def _repeated(self, part: Part) -> Part:
        """A part with what stands behind it: ``?``, ``*``, ``+`` or a count, each also lazy or, the first three, possessive."""
        letter = self.text[self.place : self.place + 1]
        least: int
        most: float
        if letter and letter in "?*+":
            self.place += 1
            least, most = {"?": (0, 1), "*": (0, math.inf), "+": (1, math.inf)}[letter]
            if not self._takes("?"):
                self._takes("+")
        elif counted := _COUNT.match(self.text, self.place):
            self.place = counted.end()
            if counted[4] is not None:
                least, most = 0, int(counted[4])
            else:
                least = int(counted[1])
                most = least if counted[2] is None else int(counted[3]) if counted[3] else math.inf
        else:
            return part
        if self.place < len(self.text) and (self.text[self.place] in "?*+" or _COUNT.match(self.text, self.place)):
            raise PatternRefused(f"a repetition of a repetition at character {self.place}")
        if most < least:
            raise PatternRefused("a repetition whose end comes before its start")
        if most == math.inf and part.ways:
            raise PatternRefused("an endless repetition of what can itself be matched in several ways")
        if most == math.inf and part.least == 0:
            raise PatternRefused("an endless repetition of what may be empty")
        counts = _ENDLESS if most == math.inf else math.log2(most - least + 1)
        before = part.ways * max(0, (1 if most == math.inf else most) - 1)  # all but the last stand before another
        return Part(part.least * least, before + part.ways + counts, before + part.tried, least == 0)

    def _takes(self, text: str) -> bool:
        """Goes past a text that stands here; False if another does."""
        there = self.text.startswith(text, self.place)
        self.place += len(text) if there else 0
        return there
