"""Tokenizer files that abort, hang or eat memory where they are loaded, or that tell tokens which the model lacks."""

from __future__ import annotations

import base64
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.cases import Place, Variant, Variants
from tests.hostile.manifests import mutated

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
Change = Callable[[dict[str, Any]], Any]


def changed(change: Change, file: str = FILE) -> Callable[[Place], None]:
    """Changes a JSON file of the folder."""

    def make(place: Place) -> None:
        path = place.model / file
        data = json.loads(path.read_text())
        data = change(data) or data
        path.write_text(json.dumps(data))

    return make


def raw(content: bytes, file: str = FILE) -> Callable[[Place], None]:
    """Other bytes in a file's place."""
    return lambda place: _written(place.model / file, content)


def _written(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def normalizer(*parts: dict[str, Any]) -> Change:
    """A sequence of normalizers."""
    return lambda data: data.update(normalizer={"type": "Sequence", "normalizers": list(parts)})


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    """A Replace normalizer."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def splitting(regex: str) -> Change:
    """A pre-tokenizer that splits by a regular expression."""
    part = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return lambda data: data.update(pre_tokenizer=part)


def charsmap(content: bytes) -> Change:
    """A Precompiled normalizer over such a map."""
    text = base64.b64encode(content).decode()
    return lambda data: data.update(normalizer={"type": "Precompiled", "precompiled_charsmap": text})


def growing(times: int, factor: int) -> Change:
    """Replace after Replace, each of which makes a text so many times longer."""
    return normalizer(*[replace({"String": "a"}, "a" * factor)] * times)


def added(count: int, content: str = "<x{}>", **fields: Any) -> Change:
    """More added tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **fields}

    def apply(data: dict[str, Any]) -> None:
        data["added_tokens"] += [{"id": 800 + i, "content": content.format(i), **flags} for i in range(count)]

    return apply


def model(**fields: Any) -> Change:
    """Other fields of the BPE model."""
    return lambda data: data["model"].update(fields)


def template(*ids: int) -> Change:
    """A post-processor that puts such tokens before every text."""
    special = {f"t{i}": {"id": f"t{i}", "ids": [i], "tokens": [f"t{i}"]} for i in ids}
    single = [*({"SpecialToken": {"id": f"t{i}", "type_id": 0}} for i in ids), {"Sequence": {"id": "A", "type_id": 0}}]
    record = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    return lambda data: data.update(post_processor=record)


def other(kind: str, **fields: Any) -> Change:
    """Another kind of model."""
    return lambda data: data.update(model={"type": kind, **fields})


def deep(depth: int) -> Change:
    """Sequences of normalizers in sequences."""

    def apply(data: dict[str, Any]) -> None:
        inner: dict[str, Any] = {"type": "NFC"}
        for _ in range(depth):
            inner = {"type": "Sequence", "normalizers": [inner]}
        data["normalizer"] = inner

    return apply


def _shifted(data: dict[str, Any]) -> None:
    """Each token has the id of the next one."""
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = {text: (index + 1) % len(vocabulary) for text, index in vocabulary.items()}


def _beyond(data: dict[str, Any]) -> None:
    """Ids that the model has no embedding for."""
    data["model"]["vocab"] = {text: index + 5000 for text, index in data["model"]["vocab"].items()}


def _huge(place: Place) -> None:
    """A file of 20 GB that takes no room."""
    os.truncate(place.model / FILE, 20 << 30)


def _old_pair(vocabulary: bytes, merges: bytes) -> Callable[[Place], None]:
    """The older two files in place of the one."""

    def make(place: Place) -> None:
        (place.model / FILE).unlink()
        (place.model / "vocab.json").write_bytes(vocabulary)
        (place.model / "merges.txt").write_bytes(merges)

    return make


def variants(count: int) -> Variants:
    """Variants of the tokenizer's files; after those made by hand as many random ones as come to ``count``."""
    made = [Variant(name, make, "safe", "tokenizer") for name, make in _by_hand().items()]
    yield from made[:count]
    for seed in range(count - len(made)):
        yield Variant(f"random-{seed:04}", _random(seed), "safe", "tokenizer")


def _random(seed: int) -> Callable[[Place], None]:
    rng = random.Random(seed)
    file = rng.choice([FILE, FILE, FILE, SETTINGS, "config.json"])

    def make(place: Place) -> None:
        path = place.model / file
        if seed % 4 == 0:
            data = bytearray(path.read_bytes())
            for _ in range(rng.randrange(1, 5)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
            return
        found = json.loads(path.read_text())
        for _ in range(rng.randrange(1, 3)):
            found = mutated(found, rng)
        path.write_text(json.dumps(found))

    return make


def _by_hand() -> dict[str, Callable[[Place], None]]:
    words = {"a": 0, "b": 1, "<unk>": 2}
    found: dict[str, Callable[[Place], None]] = {
        "charsmap-empty": changed(charsmap(b"")),
        "charsmap-short": changed(charsmap(b"\xff\xff")),
        "charsmap-length": changed(charsmap(struct.pack("<I", 2**31 - 4) + b"\0" * 16)),
        "charsmap-zeros": changed(charsmap(struct.pack("<I", 64) + b"\0" * 64)),
        "charsmap-ones": changed(charsmap(struct.pack("<I", 1024) + b"\xff" * 1024 + b"x\0")),
        "charsmap-random": changed(charsmap(struct.pack("<I", 4096) + random.Random(1).randbytes(4200))),
        "charsmap-no-base64": changed(
            lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "?"})
        ),
        "replace-100-5": changed(growing(5, 100)),
        "replace-100-12": changed(growing(12, 100)),
        "replace-2-40": changed(growing(40, 2)),
        "replace-long": changed(normalizer(replace({"String": ""}, "a" * 10_000))),
        "replace-regex": changed(normalizer(replace({"Regex": "(a*)*b"}, "x"))),
        "prepend-long": changed(normalizer({"type": "Prepend", "prepend": "a" * 50_000_000})),
        "prepend-many": changed(normalizer(*[{"type": "Prepend", "prepend": "a" * 10_000}] * 2000)),
        "regex-nested": changed(splitting("(a+)+$")),
        "regex-nested-2": changed(splitting("((((a*)*)*)*)*b")),
        "regex-words": changed(splitting(r"^(\w+\s?)*$")),
        "regex-repeats": changed(splitting("(x{1,1000}){1,1000}")),
        "regex-alternatives": changed(splitting("(a|a|a|a|a)*!")),
        "regex-look-behind": changed(splitting("(?<=(a+)+b)c")),
        "regex-back": changed(splitting(r"(.*)\1\1\1x")),
        "regex-open": changed(splitting("(")),
        "regex-empty": changed(splitting("")),
        "regex-long": changed(splitting("a?" * 20_000 + "a" * 20_000)),
        "regex-recursion": changed(splitting(r"(?<n>a\g<n>?b)")),
        "deep-100": changed(deep(100)),
        "deep-20000": raw(b'{"normalizer":' + b'{"type":"Sequence","normalizers":[' * 20_000),
        "brackets": raw(b"[" * 300_000),
        "empty": raw(b""),
        "null": raw(b"null"),
        "list": raw(b"[]"),
        "not-utf-8": raw(b'{"version": "\xff"}'),
        "nul": raw(b"\0" * 100),
        "bom": raw(b"\xef\xbb\xbf{}"),
        "huge": _huge,
        "added-100000": changed(added(100_000)),
        "added-same": changed(added(1000, "same")),
        "added-empty": changed(added(1, "")),
        "added-letter": changed(added(1, "e", special=False)),
        "added-surrogate": raw(b'{"added_tokens":[{"id":0,"content":"\\ud800"}]}'),
        "added-long": changed(added(1, "a" * 3_000_000)),
        "added-huge-id": changed(
            lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 2**32 - 1, "content": "<y>"})
        ),
        "added-minus-id": changed(
            lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": -1, "content": "<y>"})
        ),
        "ids-shifted": changed(_shifted),
        "ids-beyond": changed(_beyond),
        "ids-huge": changed(lambda d: d["model"]["vocab"].update(zzz=2**32 - 1)),
        "ids-too-huge": changed(lambda d: d["model"]["vocab"].update(zzz=2**40)),
        "ids-minus": changed(lambda d: d["model"]["vocab"].update(zzz=-1)),
        "vocab-empty": changed(model(vocab={}, merges=[])),
        "vocab-list": changed(model(vocab=[])),
        "merges-of-nothing": changed(model(merges=[["nothing", "there"]])),
        "merges-one": changed(model(merges=["a"])),
        "merges-text": changed(model(merges="a b")),
        "dropout-1": changed(model(dropout=1.0)),
        "dropout-half": changed(model(dropout=0.5)),
        "dropout-nan": raw(b'{"model":{"type":"BPE","dropout":NaN}}'),
        "byte-fallback": changed(model(byte_fallback=True, unk_token="nothing")),
        "unk-missing": changed(model(unk_token="nothing", fuse_unk=True)),
        "prefix-long": changed(model(continuing_subword_prefix="a" * 1_000_000)),
        "suffix": changed(model(end_of_word_suffix="\0")),
        "wordpiece": changed(
            other(
                "WordPiece",
                vocab=words,
                unk_token="<unk>",
                continuing_subword_prefix="##",
                max_input_chars_per_word=2**62,
            )
        ),
        "wordpiece-no-unk": changed(
            other("WordPiece", vocab=words, unk_token="no", continuing_subword_prefix="##", max_input_chars_per_word=5)
        ),
        "wordlevel": changed(other("WordLevel", vocab=words, unk_token="<unk>")),
        "wordlevel-no-unk": changed(other("WordLevel", vocab=words, unk_token="no")),
        "unigram": changed(other("Unigram", vocab=[["a", -1.0], ["<unk>", 0.0]], unk_id=1)),
        "unigram-unk-beyond": changed(other("Unigram", vocab=[["a", -1.0]], unk_id=7)),
        "unigram-empty": changed(other("Unigram", vocab=[], unk_id=None)),
        "unigram-nan": raw(b'{"model":{"type":"Unigram","unk_id":0,"vocab":[["a",NaN]]}}'),
        "unigram-infinite": changed(other("Unigram", vocab=[["a", -1e308], ["aa", 1e308], ["<unk>", 0]], unk_id=2)),
        "unknown-model": changed(other("Nonsense", vocab=words)),
        "template-0": changed(template(0)),
        "template-beyond": changed(template(5000)),
        "template-huge": changed(template(2**32 - 1)),
        "template-100000": changed(template(*[0] * 100_000)),
        "padding": changed(
            lambda d: d.update(
                padding={
                    "strategy": {"Fixed": 2**40},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "x",
                }
            )
        ),
        "truncation": changed(
            lambda d: d.update(
                truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
            )
        ),
        "truncation-stride": changed(
            lambda d: d.update(
                truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
            )
        ),
        "decoder": changed(
            lambda d: d.update(decoder={"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x" * 1000})
        ),
        "no-model": changed(lambda d: d.pop("model") and None),
        "version": changed(lambda d: d.update(version=99)),
        "settings-list": raw(b"[]", SETTINGS),
        "settings-null": raw(b"null", SETTINGS),
        "settings-not-utf-8": raw(b'{"bos_token":"\xff"}', SETTINGS),
        "settings-deep": raw(b"[" * 200_000, SETTINGS),
        "settings-digits": raw(b'{"bos_token":' + b"9" * 6000 + b"}", SETTINGS),
        "settings-side": changed(lambda d: d.update(padding_side="middle"), SETTINGS),
        "settings-side-list": changed(lambda d: d.update(padding_side=["left"]), SETTINGS),
        "settings-bos-list": changed(lambda d: d.update(bos_token=["a"]), SETTINGS),
        "settings-bos-number": changed(lambda d: d.update(bos_token=7), SETTINGS),
        "settings-bos-object": changed(lambda d: d.update(bos_token={"content": {"content": 1}}), SETTINGS),
        "settings-bos-missing": changed(lambda d: d.update(bos_token="nothing"), SETTINGS),
        "config-ids-list": changed(lambda d: d.update(eos_token_id=[7, -1, "x", None, 2**70]), "config.json"),
        "config-ids-huge": changed(lambda d: d.update(bos_token_id=2**70, eos_token_id=-(2**70)), "config.json"),
        "config-list": raw(b"[]", "config.json"),
        "config-not-json": raw(b"{", "config.json"),
        "pair-empty": _old_pair(b"{}", b""),
        "pair-list": _old_pair(b"[]", b"#version\na b c d\n"),
        "pair-huge-id": _old_pair(b'{"a":4294967295,"b":1,"ab":2}', b"a b\n"),
        "pair-not-utf-8": _old_pair(b'{"\xff":1}', b"\xff \xfe\n"),
    }
    return found
