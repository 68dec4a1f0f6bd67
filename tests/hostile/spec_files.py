"""Edits files and sweep results as text: damaged, made by hand, or written by somebody else."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
from hypothesis import strategies as st

from graphlens import interventions
from graphlens.analysis.result import SweepResult
from tests.hostile import spec_edits
from tests.hostile.cases import Place
from tests.hostile.manifests import mutated
from tests.hostile.truth import OPERANDS, Edit, differs, is_number

FORMAT = "graphlens.interventions"
FIELDS = {"kind", "hook", "heads", "positions", "dims", "batch", "strict", "allow_nonfinite"}


# Edits files


@st.composite
def edit_files(draw: st.DrawFn) -> dict[str, Any]:
    """An edits file: what it says, its arrays, and how it was damaged."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    hook = draw(st.sampled_from(spec_edits.HOOKS[1:]))
    shape, fields = spec_edits.shape_of(hook, batch, length), spec_edits.fields_at(hook)
    records, arrays = [], {}
    for index in range(draw(st.sampled_from([1, 1, 2]))):
        kind = draw(st.sampled_from(sorted(OPERANDS)))
        record: dict[str, Any] = {"kind": kind, "hook": hook, OPERANDS[kind]: draw(st.sampled_from([0.0, 1.5, -2, 3]))}
        if draw(st.booleans()):
            name = f"{index}.{OPERANDS[kind]}"
            rng = np.random.default_rng(draw(st.integers(0, 9)))
            arrays[name] = rng.standard_normal(shape[-1]).astype(
                draw(st.sampled_from(["float32", "float64", "float16"]))
            )
            record[OPERANDS[kind]] = {"tensor": name}
        for field, size in zip(fields, shape, strict=True):
            if field and field != "dims" and draw(st.integers(0, 3)) == 0:
                record[field] = draw(
                    st.integers(-size, size - 1)
                    | st.just({"slice": [0, None, 2]})
                    | st.lists(st.booleans(), min_size=size, max_size=size).map(lambda m: [*m[:-1], True])
                )
        if kind == "steer" and draw(st.booleans()):
            record["coefficient"] = draw(st.sampled_from([2.0, 0, {"number": "nan"}, {"number": "0.5"}]))
        records.append(record)
    return {
        "seed": draw(st.integers(0, 99)),
        "batch": batch,
        "length": length,
        "data": {"format": FORMAT, "version": 1, "interventions": records},
        "arrays": arrays,
        "damage": draw(
            st.sampled_from(["none"] * 3 + ["json"] * 5 + ["text", "text", "arrays", "no arrays", "array bytes", "raw"])
        ),
        "raw": draw(st.sampled_from(_raw())),
    }


def _raw() -> list[bytes]:
    one = b'{"format":"graphlens.interventions","version":1,"interventions":'
    return [
        b"", b"null", b"[]", b"7", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe",
        b"\xef\xbb\xbf" + one + b"[]}", one + b"[]}",
        one + b"{}}", one + b"null}", one + b'"ablate"}', one + b"[null]}", one + b"[[]]}", one + b"7}",
        one + b'[{"kind":["ablate"]}]}',
        one + b'[{"kind":"ablate"}]}', one + b'[{"kind":"ablate","hook":null}]}', one + b'[{"kind":"ablate","hook":{}}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","value":NaN}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","value":1e999}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","value":' + b"9" * 6000 + b"}]}",
        one + b'[{"kind":"ablate","hook":"hook_embed","heads":' + b"9" * 400 + b"}]}",
        one + b'[{"kind":"ablate","hook":"hook_embed","positions":{"slice":[0,1,0]}}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","positions":{"slice":[0,1]}}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","positions":{"slice":"abc"}}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","value":{"number":"x"}}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","value":{"number":[]}}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","value":{"tensor":"../x"}}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","value":"\\ud800"}]}', one + b'[{"kind":"ablate","hook":"\\ud800"}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","_unnamed":1}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","self":1}]}',
        one + b'[{"kind":"ablate","hook":"hook_embed","strict":"no"}]}',
        one + b'[{"kind":"ablate","hook":"a","hook":"hook_embed"}]}',
        one.replace(b":1,", b":2,") + b"[]}", one.replace(b":1,", b":true,") + b"[]}", one.replace(b":1,", b":1.9,") + b"[]}",
        one.replace(b":1,", b':"1",') + b"[]}", one.replace(b":1,", b":-1,") + b"[]}", one.replace(b":1,",
        b":1e400,") + b"[]}",
        one.replace(b":1,", b":" + b"9" * 6000 + b",") + b"[]}",
        one + b"[" + b",".join([b'{"kind":"ablate","hook":"hook_embed"}'] * 3000) + b"]}",
    ]  # fmt: skip


def write_edits(spec: dict[str, Any], place: Place) -> None:
    """Writes an edits file as the spec says, and its arrays beside it."""
    from safetensors.numpy import save

    rng = random.Random(repr(spec["seed"]) + spec["damage"])
    data, arrays = spec["data"], dict(spec["arrays"])
    if spec["damage"] == "json":
        data = mutated(data, rng)
        if rng.randrange(3) == 0:
            data = mutated(data, rng)
    text = json.dumps(data).encode()
    if spec["damage"] == "text":
        text = _damaged(text, rng)
    if spec["damage"] == "raw":
        text, arrays = spec["raw"], {}
    if spec["damage"] == "no arrays":
        arrays = {}
    if spec["damage"] == "arrays" and arrays:
        name = rng.choice(list(arrays))
        arrays[name] = rng.choice(
            [arrays[name][:-1], arrays[name][None].repeat(3, 0), arrays[name] * np.nan, np.zeros(0)]
        )
    place.edits.write_bytes(text)
    if arrays:
        packed = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        if spec["damage"] == "array bytes":
            packed = _damaged(packed, rng)
        place.edits.with_suffix(".safetensors").write_bytes(packed)


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one place changed, cut or doubled."""
    at, kind = rng.randrange(len(data)), rng.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at + 1 :]
    if kind == 3:
        return data[:at] + data[at : at + 9] + data[at:]
    return data[:at] + rng.choice([b"\xff", b"\\ud800", b"-", b"9" * 30, b"null", b"\0"]) + data[at:]


def said(text: bytes, arrays: dict[str, np.ndarray]) -> list[Edit]:
    """What an edits file says, read anew by the format's description. Raises ValueError where it says nothing."""
    data = json.loads(text.decode("utf-8"))
    if data["format"] != FORMAT or type(data["version"]) is not int or data["version"] != 1:
        raise ValueError("another format")
    if not isinstance(data["interventions"], list):
        raise ValueError("interventions are a list")
    found = []
    for record in data["interventions"]:
        kind = record["kind"]
        allowed = FIELDS | {OPERANDS[kind]} | ({"coefficient"} if kind == "steer" else set())
        if set(record) - allowed or not isinstance(record["hook"], str):
            raise ValueError("unknown fields")
        if any(type(record.get(flag, False)) is not bool for flag in ("strict", "allow_nonfinite")):
            raise ValueError("a flag is true or false")
        edit = {name: _value(value, arrays) for name, value in record.items()}
        found.append({OPERANDS[kind]: 0.0, **edit} if kind == "ablate" else edit)
    return found


def _value(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The value of a field."""
    if not isinstance(value, dict):
        return value
    ((key, inner),) = value.items()
    if key == "tensor":
        return arrays[inner]
    if key == "slice":
        start, stop, step = inner
        if not all(part is None or type(part) is int for part in (start, stop, step)):
            raise ValueError("a slice is of ints")
        return slice(start, stop, step)
    if key == "number" and isinstance(inner, str | int | float):
        return float(inner)
    raise ValueError(f"{key} is no value")


def run_edits(warm: Any, spec: dict[str, Any], place: Place) -> list[str]:
    """Loads an edits file, runs it, and compares the logits with what the file says."""
    from safetensors.numpy import load

    loaded = interventions.load(place.edits)
    tokens = spec_edits.tokens_of(spec, warm.truth)
    found = warm.model.run_with_interventions(tokens, loaded)
    beside = place.edits.with_suffix(".safetensors")
    try:
        made = said(place.edits.read_bytes(), load(beside.read_bytes()) if beside.exists() else {})
        right = spec_edits.expected(warm.truth, tokens, made) if made else warm.truth.run(tokens)[0]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return [f"it loaded and ran, and the file says nothing that can be run ({error})"]
    if right is None:
        return ["it ran, and it fits no rule that is written down"]
    return differs(found, right, "logits")


# Sweep results


def _sweep() -> SweepResult:
    """A result of odd sizes."""
    values = np.random.default_rng(5).standard_normal((2, 3, 5))
    labels = {"metric": ["a", "b"], "layer": ["0", "1", "2"], "pos": [f"t{i}" for i in range(5)]}
    return SweepResult(
        values, ("metric", "layer", "pos"), labels, {"clean": np.array([1.0, 2.0]), "corrupted": None}, {"x": [1]}
    )


@st.composite
def results(draw: st.DrawFn) -> dict[str, Any]:
    """How a saved result was damaged."""
    kinds = ["none", "json", "json", "json", "text", "text", "arrays", "arrays", "no arrays", "swap", "raw"]
    return {
        "seed": draw(st.integers(0, 10**6)),
        "damage": draw(st.sampled_from(kinds)),
        "raw": draw(st.sampled_from(_raw())),
    }


def write_result(spec: dict[str, Any], place: Place) -> None:
    """Saves a result, then damages it."""
    rng = random.Random(spec["seed"])
    _sweep().save(place.result)
    beside, kind = place.result.with_suffix(".safetensors"), spec["damage"]
    if kind == "json":
        place.result.write_text(json.dumps(mutated(json.loads(place.result.read_text()), rng)))
    elif kind == "text":
        place.result.write_bytes(_damaged(place.result.read_bytes(), rng))
    elif kind == "arrays":
        beside.write_bytes(_damaged(beside.read_bytes(), rng))
    elif kind == "no arrays":
        beside.unlink()
    elif kind == "swap":
        other = SweepResult(_sweep().values + 1, _sweep().axes, _sweep().labels)
        other.save(place.result.with_name("other.json"))
        beside.write_bytes(place.result.with_name("other.safetensors").read_bytes())
    elif kind == "raw":
        place.result.write_bytes(spec["raw"])


def read_result(_: Any, spec: dict[str, Any], place: Place) -> list[str]:
    """Loads a saved result and compares its numbers."""
    found, right = SweepResult.load(place.result), _sweep()
    wrong = differs(found.values, right.values, "values", 0)
    wrong += [] if found.axes == right.axes else [f"axes are {found.axes}"]
    clean = found.baselines["clean"]
    wrong += (
        ["the baseline is gone"] if clean is None else differs(np.asarray(clean), np.array([1.0, 2.0]), "baseline", 0)
    )
    repr(found), found.top(2)
    assert all(is_number(float(value)) for value in found.values.flat[:3])
    return wrong
