"""Strangers' tokenizers: what would abort, hang or eat memory is refused by name, and those of the known families load."""

from __future__ import annotations

import base64
import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from graphlens import HookedTransformer
from graphlens.errors import ModelFileError
from graphlens.file import settings, tokenizer_check, tokenizer_parts
from graphlens.file.patterns import MAX_LENGTH, PatternRefused, least_match
from graphlens.file.tokenizer import load_tokenizer

Parts = dict[str, Any]
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}


def written(folder: Path, **parts: Any) -> Path:
    """A folder with a tokenizer.json of those parts, and of a model of one word."""
    whole = {"version": "1.0", "added_tokens": [], "model": WORDS, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


def refused(folder: Path, *says: str) -> None:
    """Checks that the tokenizer is refused, with its file's name, before the tokenizers package sees it."""
    with pytest.raises(ModelFileError) as caught:
        load_tokenizer(folder)
    for part in (str(folder / "tokenizer.json"), *says):
        assert part in str(caught.value)


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which the tokenizers package gets a file."""
    monkeypatch.setattr("tokenizers.Tokenizer", type("Unseen", (), {}))


def split(expression: str) -> Parts:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def replacing(content: str, **pattern: str) -> Parts:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*members: Parts, key: str = "normalizers") -> Parts:
    return {"type": "Sequence", key: list(members)}


# SentencePiece's table of characters


def unit(label: int = 0, offset: int = 0, leaf: bool = False) -> int:
    """A unit of a double array: a byte that leads on, by how much, and whether a text ends behind it."""
    return label | leaf << 8 | offset << 10


def table(units: dict[int, int], texts: bytes, count: int = 512) -> bytes:
    array = np.zeros(count, "<u4")
    for place, content in units.items():
        array[place] = content
    return struct.pack("<I", 4 * count) + array.tobytes() + texts


# "a" -> "bc": from the root at offset 256, through the unit of the byte "a", to the value at 256 ^ 97 ^ 128.
ROOT, A = 256, 256 ^ ord("a")
VALUE = A ^ 128
ONE_CHARACTER = {0: unit(offset=ROOT), A: unit(ord("a"), offset=128, leaf=True), VALUE: 1 << 31 | 2}


def precompiled(charsmap: bytes) -> Parts:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}


def test_a_table_of_one_character_does_what_it_says(tmp_path: Path) -> None:
    charsmap = table(ONE_CHARACTER, b"x\0bc\0")
    assert tokenizer_check.longest_replacement(charsmap) == 2
    loaded = load_tokenizer(written(tmp_path, normalizer=precompiled(charsmap)))
    assert loaded is not None
    assert loaded.fast.normalizer.normalize_str("za") == "zbc"


TABLES = {
    "none": b"",
    "cut short": b"\x01",
    "an array of four gigabytes": struct.pack("<I", 2**32 - 4) + bytes(40),
    "no array": struct.pack("<I", 0) + b"x\0",
    "an array that points outside": struct.pack("<I", 400) + b"\xff" * 400,
    "a root that points outside": table({0: unit(offset=600)}, b"x\0"),
    "a unit that points outside": table({**ONE_CHARACTER, A: unit(ord("a"), offset=4096)}, b"x\0bc\0"),
    "a block that is not whole": table(ONE_CHARACTER, b"x\0bc\0", count=500),
    "a text that is not there": table({**ONE_CHARACTER, VALUE: 1 << 31 | 99}, b"x\0bc\0"),
    "the middle of a character": table({**ONE_CHARACTER, VALUE: 1 << 31 | 1}, "é\0".encode()),
    "texts that are no UTF-8": table(ONE_CHARACTER, b"x\0\xff\xfe\0"),
    "a text without end": table(ONE_CHARACTER, b"x\0bc"),
}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("case", TABLES)
def test_a_damaged_table_of_characters_is_refused(case: str, tmp_path: Path) -> None:
    refused(written(tmp_path, normalizer=sequence(precompiled(TABLES[case]))), "normalizer[0]", "precompiled_charsmap")


def test_random_tables_that_pass_never_break_the_package_down(tmp_path: Path) -> None:
    """What the check lets through, the package can follow: bytes of a good table are changed at random."""
    good, rng = table(ONE_CHARACTER, b"x\0bc\0"), np.random.default_rng(0)
    interesting = [*range(4), *range(4, 8), *range(4 + 4 * A, 8 + 4 * A), *range(4 + 4 * VALUE, 8 + 4 * VALUE)]
    passed = 0
    for _ in range(300):
        data = bytearray(good)
        for place in rng.choice([*interesting, *range(len(good) - 5, len(good))], size=2):
            data[place] ^= 1 << rng.integers(8)
        try:
            tokenizer_check.longest_replacement(bytes(data))
        except ValueError:
            continue
        loaded = load_tokenizer(written(tmp_path, normalizer=precompiled(bytes(data))))
        assert loaded is not None
        loaded.fast.normalizer.normalize_str("aaz äa")
        passed += 1
    assert 20 < passed < 280


def test_sentencepieces_own_tables_pass() -> None:
    """Those of T5, XLM-R and ALBERT, as its trainer writes them."""
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    for rule in ("nmt_nfkc", "nmt_nfkc_cf"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the quick brown fox", "jumps over the lazy dog"] * 20),
            model_writer=model,
            vocab_size=40,
            normalization_rule_name=rule,
            hard_vocab_limit=False,
            minloglevel=3,
        )
        proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
        # U+FDFA, a whole sentence in one character, becomes 18 characters of 33 bytes.
        assert tokenizer_check.longest_replacement(proto.normalizer_spec.precompiled_charsmap) == 33


# What grows


@pytest.mark.usefixtures("unseen")
def test_replacements_of_replacements_are_refused(tmp_path: Path) -> None:
    hundred = replacing("a" * 100, String="a")
    refused(written(tmp_path, normalizer=sequence(hundred, hundred)), "normalizer", "each byte")
    refused(written(tmp_path, normalizer=sequence(sequence(hundred), sequence(hundred))), "each byte")
    refused(written(tmp_path, decoder=sequence(hundred, hundred, key="decoders")), "decoder", "each byte")
    between = replacing("a" * 40, Regex="x*")  # matches nothing between any two characters
    refused(written(tmp_path, normalizer=sequence(between, between)), "each byte")


def test_a_replacement_counts_by_how_much_it_replaces(tmp_path: Path) -> None:
    longer = replacing("a" * 100, String="b" * 50)
    loaded = load_tokenizer(written(tmp_path, normalizer=sequence(*[longer] * 9)))
    assert loaded is not None
    assert loaded.fast.normalizer.normalize_str("b" * 100) == "a" * 200


# Regular expressions


BOMBS = [
    r"(?:(?=a+)a)+b",  # what is ahead is gone through again at each step
    r"(?:(?<!x)(?!a*c)a)*b",
    r"(a+)+$",
    r"(a|aa)+$",
    r"(\w+\s?)*$",
    r"(a{1,3})+$",
    r"a*a*a*a*b",
    r"a+a+b",
    "a?" * 40 + "a" * 40,
    r"(?:a?){50}a{50}",
    r"((a{0,30}){0,30}){0,30}",
    r"(a)\1",
    r"(?<x>a\g<x>?b)",
    r"(?~a)",
    r"(?(1)a|b)",
    r"(*FAIL)",
    r"a{1,2}+",
    r"(?x: a # ) )",
    "(" * 40 + "a" + ")" * 40,
    "a" * (MAX_LENGTH + 1),
    "(a",
    "a)",
    "[a",
    "*a",
]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("expression", BOMBS, ids=range(len(BOMBS)))
def test_expressions_that_could_be_matched_in_endlessly_many_ways_are_refused(expression: str, tmp_path: Path) -> None:
    refused(written(tmp_path, pre_tokenizer=sequence(split(expression), key="pretokenizers")), "pre_tokenizer[0]")
    refused(written(tmp_path, normalizer=replacing("x", Regex=expression)), "normalizer", "regular expression")


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
EXPRESSIONS = {
    "gpt2, neox, phi, olmo": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama 3": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST,
    "qwen 2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST,
    "qwen 3.5": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s+",
    "gpt-4o, phi 4": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"{CONTRACTIONS}?|\p{{N}}{{1,3}}{REST}",
    "mistral": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}{REST}",
    "kimi": r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+" + CONTRACTIONS + "?",
    "deepseek 3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    "deepseek": r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ]+",
    "cjk": r"[一-龥぀-ゟ゠-ヿ]+",
    "falcon": r"[0-9][0-9][0-9]",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "nanochat": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+",
    "exaone": CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    "superbpe": r"(?=(\d{3})+(?!\d))",
    "aya": r"\d{1,3}(?=(?:\d{3})*\b)",
    "chameleon": r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    "gemma 4": r"[^\n]+|[\n]+",
    "clip": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "t5, xlm-r": r" {2,}",
    "whitespace": r"\s+$|\S+",
}


@pytest.mark.parametrize("family", EXPRESSIONS)
def test_the_expressions_of_the_families_are_read_and_match_as_said(family: str, tmp_path: Path) -> None:
    """The least length that is told is at most that of any match in a text of all sorts."""
    expression = EXPRESSIONS[family]
    least = least_match(expression)
    loaded = load_tokenizer(written(tmp_path, pre_tokenizer=split(expression)))
    assert loaded is not None
    text = "Hello, I'LL say  123456 straße 漢字かな <|endoftext|>  IMGIMGABCZ été\r\n\n  don't\t !?…"
    pieces = loaded.fast.pre_tokenizer.pre_tokenize_str(text)
    assert "".join(piece for piece, _ in pieces) == text
    matches = pre_tokenizers.Split(Regex(expression), "removed", invert=True).pre_tokenize_str(text)
    assert bool(matches) == (least > 0)  # what may match nothing is a look ahead, and finds no digits at the end
    assert all(len(match) >= least for match, _ in matches)


@pytest.mark.parametrize("expression", [r"\s*[\r\n]+|\s+(?!\S)|\s+x|y", r"[ab]*a+(?:c|d)?|x", r"(?=( {3})+(?! ))"])
def test_what_is_allowed_ends_soon_on_the_worst_text(expression: str, tmp_path: Path) -> None:
    """One repetition without end before what can fail, the most that is allowed, on a page of what it never matches."""
    with pytest.raises(PatternRefused):
        least_match(expression.replace("*", "*[ ab]+", 1).replace("+", "+[ ab]+x", 1))
    loaded = load_tokenizer(written(tmp_path, pre_tokenizer=split(expression)))
    assert loaded is not None
    started = time.process_time()
    loaded.encode(" " * 4000 + "b" * 4000)
    assert time.process_time() - started < 4


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_a_word_without_a_token_is_an_error_that_names_the_file(kind: str, tmp_path: Path) -> None:
    more = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 5} if kind == "WordPiece" else {}
    loaded = load_tokenizer(written(tmp_path, model={"type": kind, "vocab": {"a": 0}, "unk_token": "no", **more}))
    assert loaded is not None
    assert loaded.encode("a") == [0]
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: .*(unk|UNK)"):
        loaded.encode("b")


def test_a_panic_of_the_package_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """PanicException is no Exception. Whatever the checks may miss ends so, here with the checks off."""
    monkeypatch.setattr("graphlens.file.tokenizer.check_tokenizer", lambda data, path: 0)
    file = str(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(written(tmp_path, pre_tokenizer=split("(a+)+$")))
    assert loaded is not None
    with pytest.raises(ModelFileError) as caught:
        loaded.encode("a" * 40 + "b")
    assert file in str(caught.value)
    assert loaded.encode("a") == [0]
    for parts in (
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # panics over a text
        {"normalizer": precompiled(b"")},  # and already when it is loaded
    ):
        with pytest.raises(ModelFileError) as caught:
            load_tokenizer(written(tmp_path, **parts))
        assert file in str(caught.value)
    cutting = written(tmp_path, decoder={"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9})
    decoding = load_tokenizer(cutting)
    assert decoding is not None
    with pytest.raises(ModelFileError) as caught:
        decoding.decode([0])
    assert file in str(caught.value)
    capfd.readouterr()  # the package prints each panic


def test_ctrl_c_in_the_package_stays_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), tokenizer_parts.asking("x"):
        raise KeyboardInterrupt


# Components, counts, files


def nested(depth: int) -> Parts:
    inner: Parts = {"type": "NFC"}
    for _ in range(depth):
        inner = sequence(inner)
    return inner


STRANGE: dict[str, tuple[Parts, str]] = {
    "an unknown normalizer": ({"normalizer": {"type": "Python"}}, "'Python'"),
    "a normalizer without type": ({"normalizer": {"normalizers": [{"type": "NFC"}]}}, "type None"),
    "a normalizer that is text": ({"normalizer": "NFC"}, "type None"),
    "an unknown model": ({"model": {"type": "Script"}}, "'Script'"),
    "no model": ({"model": None}, "model"),
    "an unknown part": ({"hooks": {}}, "'hooks'"),
    "a component in another's place": ({"decoder": {"type": "NFC"}}, "decoder"),
    "too many components": ({"normalizer": sequence(*[{"type": "NFC"}] * 300)}, "components"),
    "components nested too deep": ({"normalizer": nested(20)}, "deep"),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "length 0"),
    "more cut off than there is": (
        {"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 0}},
        "1000000000",
    ),
    "words without end": ({"model": {**WORDS, "type": "WordPiece", "max_input_chars_per_word": 10**9}}, "1000000000"),
    "a long text": ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**5}}, "100,000"),
    "no pattern": ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False}}, "no pattern"),
    "a special token of a thousand": (
        {"post_processor": {"type": "TemplateProcessing", "special_tokens": {"a": {"id": "a", "ids": [0] * 1000}}}},
        "1,000 tokens",
    ),
    "two patterns": ({"normalizer": replacing("x", String="a", Regex="b")}, "no pattern"),
}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("case", STRANGE)
def test_components_that_are_not_known_are_refused(case: str, tmp_path: Path) -> None:
    parts, says = STRANGE[case]
    refused(written(tmp_path, **parts), says)


def test_padding_and_truncation_that_a_file_asks_for_are_not_done(tmp_path: Path) -> None:
    """Padding to a million million tokens would abort the process."""
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    cutting = {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}
    folder = written(tmp_path, padding={**padding, "pad_to_multiple_of": None}, truncation=cutting)
    loaded = load_tokenizer(folder)
    assert loaded is not None
    assert loaded.encode("a") == [0]


@pytest.mark.usefixtures("unseen")
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    text = '{"version": "1.0", "normalizer": null, "model": {}, "normalizer": {"type": "Script"}}'
    (tmp_path / "tokenizer.json").write_text(text)
    refused(tmp_path, "twice")


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("content", [b"[" * 10**6, b"\xff\xfe", b'{"a": 1', b"", b"null", b"\0"])
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    refused(tmp_path)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_a_file_too_large_for_a_tokenizer_is_refused_unread(name: str, tmp_path: Path) -> None:
    if name != "tokenizer.json":
        (tmp_path / "vocab.json").write_text("{}")
        (tmp_path / "merges.txt").write_text("")
    with (tmp_path / name).open("wb") as file:
        file.truncate(tokenizer_check.MAX_BYTES + 1)  # a hole: it takes no disk
    with pytest.raises(ModelFileError, match=name):
        load_tokenizer(tmp_path)


def test_settings_too_large_are_refused(tiny_copy: Path) -> None:
    with (tiny_copy / "tokenizer_config.json").open("wb") as file:
        file.truncate(settings.MAX_SETTINGS_BYTES + 1)
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json"):
        HookedTransformer.from_onnx(tiny_copy)


# The tokenizers of the families, as their files are put together


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPACES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
UNIGRAM = {
    "type": "Unigram",
    "unk_id": 0,
    "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.0], ["▁a", -2.5]],
    "byte_fallback": False,
}
PIECES = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {"[UNK]": 0, "a": 1, "##a": 2},
}
BPE = {
    "type": "BPE",
    "unk_token": "<unk>",
    "byte_fallback": True,
    "vocab": {"<unk>": 0, "a": 1, "▁": 2, "▁a": 3},
    "merges": ["▁ a"],
}
BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
}
FAMILIES: dict[str, Parts] = {
    "gpt2, neox, pythia": {"pre_tokenizer": {**BYTES, "use_regex": True}, "post_processor": BYTES, "decoder": BYTES},
    "llama 3, qwen": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence(split(EXPRESSIONS["llama 3"]), BYTES, key="pretokenizers"),
        "post_processor": sequence(BYTES, BOS, key="processors"),
        "decoder": BYTES,
    },
    "llama 2, mistral, phi 3": {
        "normalizer": sequence({"type": "Prepend", "prepend": "▁"}, replacing("▁", String=" ")),
        "post_processor": BOS,
        "decoder": sequence(
            replacing(" ", String="▁"),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            key="decoders",
        ),
        "model": BPE,
    },
    "gemma": {
        "normalizer": replacing("▁", String=" "),
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": sequence(replacing(" ", String="▁"), {"type": "ByteFallback"}, {"type": "Fuse"}, key="decoders"),
        "model": BPE,
    },
    "bert": {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": PIECES,
    },
    "t5, xlm-r": {
        "normalizer": sequence(precompiled(table(ONE_CHARACTER, b"x\0bc\0")), replacing(" ", Regex=" {2,}")),
        "pre_tokenizer": sequence({"type": "WhitespaceSplit"}, SPACES, key="pretokenizers"),
        "decoder": SPACES,
        "model": UNIGRAM,
    },
    "albert": {
        "normalizer": sequence(
            replacing('"', String="``"),
            replacing('"', String="''"),
            {"type": "NFKD"},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            precompiled(table(ONE_CHARACTER, b"x\0" + b"b" * 33 + b"\0")),  # 33 bytes: its real table's longest
            replacing(" ", Regex=" {2,}"),
        ),
        "pre_tokenizer": SPACES,
        "decoder": SPACES,
        "model": UNIGRAM,
    },
    "falcon, starcoder": {
        "pre_tokenizer": sequence(
            {"type": "Punctuation", "behavior": "Contiguous"},
            {"type": "Digits", "individual_digits": True},
            BYTES,
            split(EXPRESSIONS["falcon"]),
            key="pretokenizers",
        ),
        "decoder": BYTES,
    },
    "written before models had a type": {"model": {"dropout": None, "vocab": {"a": 0}, "merges": []}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizers_of_the_families_load_as_without_the_checks(family: str, tmp_path: Path) -> None:
    folder = written(tmp_path, **FAMILIES[family])
    loaded, plain = load_tokenizer(folder), FastTokenizer.from_file(str(folder / "tokenizer.json"))
    assert loaded is not None
    for text in ("a", "aa a  a", "Aaá, 12 a"):
        assert loaded.encode(text, add_special_tokens=True) == plain.encode(text).ids
        assert loaded.decode([0, 1]) == plain.decode([0, 1], skip_special_tokens=False)


def test_the_older_pair_of_files_gives_what_the_package_reads_from_it(tiny_folder: Path, tmp_path: Path) -> None:
    from tokenizers.models import BPE as FastBPE

    model = json.loads((tiny_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    for ending in ("\n", "\r\n"):
        (tmp_path / "merges.txt").write_bytes((ending.join(["#version: 0.2", *lines]) + ending).encode())
        loaded = load_tokenizer(tmp_path)
        assert loaded is not None
        plain = FastTokenizer(FastBPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
        for word in ("When", "John", "ĠMary", "store"):
            assert loaded.fast.model.tokenize(word)[0].id == plain.model.tokenize(word)[0].id
            assert [t.id for t in loaded.fast.model.tokenize(word)] == [t.id for t in plain.model.tokenize(word)]
