"""What a stranger's tokenizer files may ask of the tokenizers package, checked before it sees them.

The package runs what the files describe: patterns, tables with offsets of their own, replacements of replacements. Where
one is malformed it aborts or panics instead of raising an error. Each limit here closes a known way to that, or to
exhaust memory or time; every tokenizer of the model families in use stays inside (tests/core/test_strange_tokenizers.py).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.errors import ModelFileError
from graphlens.file.inside import inside, read_regular
from graphlens.file.patterns import PatternRefused, least_match

if TYPE_CHECKING:
    from graphlens.file.manifest import Json

    Object = Mapping[str, Json]

MAX_BYTES = 128_000_000  # of a tokenizer.json or one of the older pair of files; Gemma's has 34 million
MAX_TOKENS = 4_000_000
MAX_COMPONENTS, MAX_DEPTH = 256, 8
MAX_TEXT = 4_096  # characters of a piece of text in a component
MAX_CUT = 64  # characters that a decoder cuts off, tokens that stand for one special token
MAX_GROWTH = (
    1_024.0  # bytes that a byte of the text may become, all normalizers, or all decoders, together; ALBERT's: 594
)
MAX_WORD = 10_000  # characters of a word that WordPiece looks at; the work grows with the square

# Part of a tokenizer -> the components that it may have -> how many bytes each can make of one.
_GROWTH: Mapping[str, Mapping[str, float]] = {
    "normalizer": {
        **dict.fromkeys(("Sequence", "Replace", "Precompiled"), 1),  # what they make of it is computed
        **dict.fromkeys(("Prepend", "Strip", "StripAccents", "Nmt"), 1),  # Prepend adds once
        "Lowercase": 1.5,
        "ByteLevel": 2,
        "BertNormalizer": 4,
        "NFC": 3,
        "NFD": 4,
        "NFKC": 12,
        "NFKD": 12,
    },
    "pre_tokenizer": dict.fromkeys(
        (
            *(
                "Sequence",
                "ByteLevel",
                "Metaspace",
                "Whitespace",
                "WhitespaceSplit",
                "BertPreTokenizer",
                "Digits",
                "Split",
            ),
            *("Punctuation", "CharDelimiterSplit", "UnicodeScripts", "FixedLength"),
        ),
        1,
    ),
    "post_processor": dict.fromkeys(
        ("Sequence", "ByteLevel", "BertProcessing", "RobertaProcessing", "TemplateProcessing"), 1
    ),
    "decoder": dict.fromkeys(
        (
            *("Sequence", "ByteLevel", "Metaspace", "Replace", "Fuse", "Strip", "ByteFallback", "WordPiece"),
            "BPEDecoder",
        ),
        1,
    ),
}
_MEMBERS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
_MODELS = frozenset({"BPE", "WordPiece", "Unigram", "WordLevel"})
_ROOT = frozenset({"version", "truncation", "padding", "added_tokens", "model", *_MEMBERS})


def read_checked(path: Path) -> bytes:
    """The content of a tokenizer's file, or an error where it is too large to be one.

    Args:
        path: The file.

    Raises:
        ModelFileError: It is larger, no regular file, or a link that leaves its folder.
        OSError: It cannot be read.
    """
    return read_regular(inside(path.parent, path.name), MAX_BYTES)


def check_tokenizer(data: bytes, path: Path) -> int:
    """Refuses a tokenizer.json whose components are unknown, or could take more memory or time than a tokenizer needs.

    Args:
        data: The file's content.
        path: The file, for messages.

    Returns:
        How many components it has, the model not counted.

    Raises:
        ModelFileError: It is refused; the message says for which component.
    """
    try:
        whole = json.loads(str(data, "utf-8"), object_pairs_hook=_once)
        if not isinstance(whole, dict):
            raise _Refused("it holds no JSON object")
        return _Check().whole(whole)
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ModelFileError(f"{path}: its tokenizer files cannot be read: this one is not JSON ({error}).") from error
    except (_Refused, PatternRefused) as error:
        raise ModelFileError(f"{path}: this tokenizer is not one that graphlens loads: {error}.") from error


class _Refused(ValueError):
    """What is wrong with a tokenizer, without its file's name."""


def _once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """A JSON object each of whose keys is there once: of two, readers take either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Refused("a JSON object in it has one key twice")
    return found


class _Check:
    """One pass over a tokenizer; counts its components."""

    def __init__(self) -> None:
        self.components = 0
        self.details: Mapping[str, Callable[[Object, str], float]] = {
            "Replace": self._replace,
            "Precompiled": self._precompiled,
            "Split": self._split,
            "Strip": self._strip,
            "FixedLength": self._fixed_length,
            "TemplateProcessing": self._template,
        }

    def whole(self, data: Object) -> int:
        """See ``check_tokenizer``."""
        unknown = sorted(set(data) - _ROOT)
        if unknown:
            raise _Refused(f"it has a part {unknown[0]!r}, which is not known")
        for part in _MEMBERS:
            component = data.get(part)
            if component is not None and self._component(component, part, part, 0) > MAX_GROWTH:
                raise _Refused(f"its {part} could make over {MAX_GROWTH:,.0f} bytes of each byte of a text")
        self._model(data.get("model"))
        added = data.get("added_tokens")
        if added is not None and (not isinstance(added, list) or len(added) > MAX_TOKENS):
            raise _Refused(f"its added_tokens are no list, or more than {MAX_TOKENS:,}")
        return self.components

    def _component(self, data: Json, part: str, where: str, depth: int) -> float:
        """How many bytes a component can make of one."""
        self.components += 1
        if self.components > MAX_COMPONENTS or depth > MAX_DEPTH:
            raise _Refused(f"it has over {MAX_COMPONENTS} components, or some nested over {MAX_DEPTH} deep")
        kind = data.get("type") if isinstance(data, dict) else None
        if not isinstance(data, dict) or not isinstance(kind, str) or kind not in _GROWTH[part]:
            raise _Refused(f"its {where} is of the type {kind!r}; known are {', '.join(sorted(_GROWTH[part]))}")
        if kind == "Sequence":
            members = data.get(_MEMBERS[part])
            if not isinstance(members, list):
                raise _Refused(f"its {where} is a sequence without {_MEMBERS[part]!r}")
            growth = 1.0
            for index, member in enumerate(members):
                growth *= max(1.0, self._component(member, part, f"{where}[{index}]", depth + 1))
            return growth
        for key, value in data.items():
            if isinstance(value, str) and key != "precompiled_charsmap" and len(value) > MAX_TEXT:
                raise _Refused(f"its {where} ({kind}) has a text of {len(value):,} characters as {key!r}")
        detail = self.details.get(kind)
        return _GROWTH[part][kind] if detail is None else detail(data, where)

    def _pattern(self, data: Object, where: str) -> tuple[int, int]:
        """(characters, bytes) that a component's pattern, a text or a regular expression, matches at the least."""
        pattern = data.get("pattern")
        if isinstance(pattern, dict) and len(pattern) == 1:
            text, expression = pattern.get("String"), pattern.get("Regex")
            if isinstance(text, str) and len(text) <= MAX_TEXT:
                return len(text), len(text.encode("utf-8", "replace"))
            if isinstance(expression, str):
                try:
                    least = least_match(expression)
                except PatternRefused as error:
                    raise _Refused(f"its {where} has a regular expression that is refused: {error}") from error
                return least, least
        raise _Refused(f"its {where} has no pattern that is a text or a regular expression")

    def _split(self, data: Object, where: str) -> float:
        self._pattern(data, where)
        return 1

    def _replace(self, data: Object, where: str) -> float:
        _, least = self._pattern(data, where)
        content = data.get("content")
        if not isinstance(content, str):
            raise _Refused(f"its {where} replaces by something that is no text")
        size = len(content.encode("utf-8", "replace"))
        return size / least if least else 1 + size  # what matches nothing matches between any two characters

    def _precompiled(self, data: Object, where: str) -> float:
        charsmap = data.get("precompiled_charsmap")
        if not isinstance(charsmap, str):
            raise _Refused(f"its {where} has no precompiled_charsmap")
        try:
            return longest_replacement(base64.b64decode(charsmap, validate=True))
        except (binascii.Error, ValueError) as error:
            raise _Refused(f"its {where} has a damaged precompiled_charsmap ({error})") from error

    def _strip(self, data: Object, where: str) -> float:
        for key in ("start", "stop"):
            count = data.get(key)
            if count is not None and not (isinstance(count, int) and 0 <= count <= MAX_CUT):
                raise _Refused(f"its {where} cuts off {count!r} characters; at most {MAX_CUT} are allowed")
        return 1

    def _fixed_length(self, data: Object, where: str) -> float:
        length = data.get("length")
        if not (isinstance(length, int) and length >= 1):
            raise _Refused(f"its {where} cuts pieces of length {length!r}")
        return 1

    def _template(self, data: Object, where: str) -> float:
        for key in ("single", "pair"):
            pieces = data.get(key)
            if isinstance(pieces, list) and len(pieces) > MAX_COMPONENTS:
                raise _Refused(f"its {where} puts {len(pieces):,} pieces together")
        special = data.get("special_tokens")
        for name, token in special.items() if isinstance(special, dict) else ():
            ids = token.get("ids") if isinstance(token, dict) else None
            if isinstance(ids, list) and len(ids) > MAX_CUT:
                raise _Refused(f"its {where} puts {len(ids):,} tokens in the place of {name[:40]!r}")
        return 1

    def _model(self, data: Json) -> None:
        """The model: known, and of a size that a vocabulary can have."""
        # Files written before the package named the model have no type; it is then one that fits the keys.
        if not isinstance(data, dict) or data.get("type", "BPE") not in _MODELS:
            kind = data.get("type") if isinstance(data, dict) else None
            raise _Refused(f"its model is of the type {kind!r}; known are {', '.join(sorted(_MODELS))}")
        for key in ("vocab", "merges"):
            entries = data.get(key)
            if isinstance(entries, (dict, list)) and len(entries) > MAX_TOKENS:
                raise _Refused(f"its model's {key} has {len(entries):,} entries; at most {MAX_TOKENS:,} are allowed")
        longest = data.get("max_input_chars_per_word")
        if longest is not None and not (isinstance(longest, int) and 0 <= longest <= MAX_WORD):
            raise _Refused(f"its model looks at words of {longest!r} characters; at most {MAX_WORD:,} are allowed")


def longest_replacement(charsmap: bytes) -> float:
    """How many bytes the longest text has that SentencePiece's table of characters puts in another's place.

    The table is a trie in a double array, then the texts, each ended by a zero byte. Units of the array hold offsets that
    the package follows without looking where they lead.

    Args:
        charsmap: The table: the array's size in bytes, its units, all uint32 of little endian, and the texts.

    Returns:
        The number of bytes, at least 1.

    Raises:
        ValueError: An offset leads outside, or the texts are no UTF-8.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size % 4 or not 4 <= size <= len(charsmap) - 4:
        raise ValueError("its size is not the one that it states")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    texts = charsmap[4 + size :]
    texts.decode("utf-8")  # UnicodeDecodeError is a ValueError
    ends = np.flatnonzero(np.frombuffer(texts, np.uint8) == 0)
    if texts and (not len(ends) or ends[-1] != len(texts) - 1):
        raise ValueError("its last text has no end")
    label = units & (1 << 31 | 0xFF)
    places = np.arange(len(units))
    inner = (label >= 1) & (label <= 0xFF) | (places == 0)  # what a byte of a text leads to; and where all begin
    nodes, at = units[inner], places[inner]
    following = at ^ ((nodes >> 10) << ((nodes & 1 << 9) >> 6))
    if (following | 0xFF).max() >= len(units):
        raise ValueError("its array points outside itself")
    starts = units[following[(nodes >> 8 & 1) == 1]] & (1 << 31) - 1
    if not len(starts):
        return 1
    if starts.max() >= len(texts):
        raise ValueError("its array points outside its texts")
    first = np.frombuffer(texts, np.uint8)[starts]
    if ((first & 0xC0) == 0x80).any():
        raise ValueError("its array points into the middle of a character")
    return float(max(1, (ends[np.searchsorted(ends, starts)] - starts).max()))
