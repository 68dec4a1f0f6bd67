"""Manifests that say what is not so: fields of other types, names that leave the folder, shapes that do not fit."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import onnx

from tests.hostile.cases import Variants
from tests.hostile.protos import Change, both, manifest_of, set_manifest

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 2**70, 1.5, 0.0, 1e308, float("nan"), float("inf"), "", "x",
    "1", "..",
    "../../outside/model.safetensors", "/etc/passwd", "model.onnx", "a\0b", "\ud800", "é" * 300, [], [0], [1, 2, 3],
    [-1, 0, 1],
    [2**40, 2**40], ["batch"], [[]], {}, {"x": 1}, {"../x": {}}, [None], ["x", None, 1.5],
)  # fmt: skip
TEXTS = (
    "", "{", "null", "[]", "7", '"x"', "{}", "[" * 100_000, '{"a":' * 50_000, "\ufeff{}", '{"format_version":1}', "nan",
    '{"format_version":1e400}', '{"format_version":true}', '{"format_version":"1"}', '{"format_version":-1}',
    '{"format_version":99}', '{"format_version":1,"format_version":99}', "9" * 5000, '{"format_version":' + "9" * 5000 + "}",
)  # fmt: skip


def paths(data: Any, depth: int = 4) -> list[tuple[Any, ...]]:
    """The places in JSON data: how each is reached."""
    found: list[tuple[Any, ...]] = []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, item in items:
        found.append((key,))
        if depth > 1:
            found += [(key, *rest) for rest in paths(item, depth - 1)]
    return found


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """JSON data with another value at a place."""
    result = copy.deepcopy(data)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


def drop(data: Any, path: tuple[Any, ...]) -> Any:
    """JSON data without what is at a place."""
    result = copy.deepcopy(data)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return result


def mutated(data: Any, rng: random.Random) -> Any:
    """JSON data with one place changed: the value replaced, dropped, wrapped, or exchanged with another's."""
    places = paths(data)
    by_top: dict[Any, list[tuple[Any, ...]]] = {}
    for place in places:
        by_top.setdefault(place[0], []).append(place)
    path = rng.choice(by_top[rng.choice(list(by_top))])  # or the many hook points would be all that is changed
    kind = rng.randrange(10)
    if kind == 0:
        return drop(data, path)
    old: Any = data
    for key in path:
        old = old[key]
    if kind == 1:
        return put(data, path, [old])
    if kind == 2 and isinstance(old, int) and not isinstance(old, bool):
        return put(data, path, old + rng.choice([-1, 1, 64]))
    if kind == 3 and isinstance(old, list) and len(old) > 1:
        return put(data, path, old[::-1])
    if kind == 4 and isinstance(old, str):
        return put(data, path, old[:-1])
    if kind == 5 and isinstance(old, dict):
        return put(data, path, {**old, "new": 1})
    return put(data, path, rng.choice(NASTY))


def _changed(seed: int) -> Change:
    def apply(proto: onnx.ModelProto) -> None:
        rng, before = random.Random(seed), manifest_of(proto)
        changed = before
        while dumped(changed) == dumped(before):
            changed = mutated(before, rng)
        set_manifest(proto, dumped(changed))

    return apply


def dumped(data: Any) -> str:
    """JSON text, without what protobuf cannot hold."""
    return json.dumps(data, separators=(",", ":"))


def _at(path: tuple[Any, ...], value: Any) -> Change:
    return lambda proto: set_manifest(proto, dumped(put(manifest_of(proto), path, value)))


def _extra_file(name: str) -> Change:
    """A weights file that only the manifest names."""

    def apply(proto: onnx.ModelProto) -> None:
        manifest = manifest_of(proto)
        manifest["files"][name] = next(iter(manifest["files"].values()))
        set_manifest(proto, dumped(manifest))

    return apply


def _swapped_hooks(proto: onnx.ModelProto) -> None:
    """Two hook points of one shape mean each other: only the seal can know."""
    manifest = manifest_of(proto)
    hooks = manifest["hooks"]
    hooks["blocks.0.hook_resid_pre"], hooks["blocks.2.hook_resid_pre"] = (
        hooks["blocks.2.hook_resid_pre"],
        hooks["blocks.0.hook_resid_pre"],
    )
    set_manifest(proto, dumped(manifest))


def variants(count: int) -> Variants:
    """Variants of the manifest: by hand, then with one place changed at random until they come to ``count``."""
    made = list(_by_hand())
    yield from made[:count]
    for seed in range(max((count - len(made) + 1) // 2, 0)):
        yield from both(f"random-{seed:04}", _changed(seed), sealed="safe")


def _by_hand() -> Variants:
    hook, weight = "blocks.0.attn.hook_q", "blocks.0.attn.W_Q"
    for number, (path, value) in enumerate((
        (("files", "model.safetensors", "size"), "3653544"), (("files", "model.safetensors", "size"), -1),
        (("files", "model.safetensors", "sha256"), ""), (("files", "model.safetensors"), []), (("files",), {}),
        (("files",), []),
        (("weights", weight, "take"), [0, 5, 2]), (("weights", weight, "take"), [9, 0, 3]),
        (("weights", weight, "take"), [1, 0, 0]), (("weights", weight, "take"), ["1", 0, 3]), (("weights", weight,
        "take"), [1]),
        (("weights", weight, "shape"), [7, 7]), (("weights", weight, "shape"), [-1, 4, 32]),
        (("weights", weight, "shape"), [2**40, 2**40]), (("weights", weight, "permute"), [0, 0, 0]),
        (("weights", weight, "permute"), [5]), (("weights", weight, "permute"), []), (("weights", weight, "tensor"),
        "nothing"),
        (("weights", weight, "file"), "config.json"), (("weights", weight), None), (("weights",), {}), (("weights",), None),
        (("hooks", hook, "value"), "nothing"), (("hooks", hook, "value"), ""), (("hooks", hook, "dtype"), "float99"),
        (("hooks", hook, "dtype"), "O"), (("hooks", hook, "axes"), ["batch"]), (("hooks", hook, "axes"), "batch"),
        (("hooks", hook, "axes"), [1, 2, 3, 4]), (("hooks", hook, "axes"), []), (("hooks",), {}), (("hooks",), []),
        (("hooks", ""), {"value": "logits", "axes": ["batch", "pos", "d_vocab"], "dtype": "float32"}),
        (("config", "n_layers"), 0), (("config", "n_layers"), 400_000_000), (("config", "n_layers"), 3), (("config",
        "n_layers"), 5),
        (("config", "n_layers"), -4), (("config", "d_vocab"), 2**40), (("config", "d_vocab"), 0), (("config", "n_ctx"), 0),
        (("config", "n_ctx"), -1), (("config", "n_ctx"), 2**62), (("config", "n_heads"), 0), (("config", "n_heads"), 3),
        (("config", "d_head"), 0), (("config", "d_model"), 1), (("config", "dtype"), "float64"), (("config", "dtype"),
        "nonsense"),
        (("config", "model_name"), "../../x"), (("config", "model_name"), "a\nb\x1b[31m"), (("config", "eps"), 10**400),
        (("config", "n_key_value_heads"), 0), (("config", "normalization_type"), "none"), (("config", "act_fn"), ""),
        (("source",), None), (("revision",), 7), (("processing",), ["fold_ln"]), (("processing",), "fold_ln"),
        (("processing",), [[]]), (("exporter",), []), (("exporter",), {"graphlens": None}), (("format_version",), 99),
        (("format_version",), True), (("format_version",), 0), (("format_version",), -1), (("format_version",), "1"),
    )):  # fmt: skip
        says_nothing_else = path[0] in ("source", "revision", "exporter") or path[-1] in ("model_name", "act_fn", "eps")
        name = "-".join(str(part) for part in path if part not in (hook, weight, "model.safetensors"))
        text = "".join(c if c.isalnum() else "." for c in str(value))[:24]
        yield from both(
            f"{number:02}-{name}-{text}", _at(path, value), sealed="either" if says_nothing_else else "safe"
        )
    yield from both("swapped-hooks", _swapped_hooks, sealed="safe")
    for index, text in enumerate(TEXTS):
        yield from both(f"text-{index:02}", lambda proto, text=text: set_manifest(proto, text), sealed="refused")
    for name in ("config.json", "absent", "..", "a/b", "C:x", "\\\\x", "x" * 300, "tokenizer.json"):
        yield from both(
            f"file-{''.join(c if c.isalnum() else '.' for c in name)[:12]}", _extra_file(name), sealed="either"
        )
