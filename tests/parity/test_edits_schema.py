"""The schema of edits files: what it takes is what the jsonschema package takes by it, and what the loader loads."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from jsonschema import Draft202012Validator, validators

from graphlens import HookedTransformer, InputError, embedded_model, interventions
from graphlens.edits.schema import definition, fault, schema
from graphlens.interventions import KINDS
from tests.hostile import spec_files, specs
from tests.intervention_specs import runs

MODEL = HookedTransformer.from_onnx(embedded_model(), "cpu")
# JSON Schema counts 1.0 as an integer. Here what is counted is written without a point.
STRICT = validators.extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int),
)
JUDGE = STRICT(schema())
# What a file may say that has the right form: these the loader alone refuses.
CONTENT = (
    "is missing from the safetensors file|holds NaN or infinities|is ragged|selects nothing|is an empty array|"
    r"=array\(|numbers, not object"
)
ARRAYS = {"a": np.ones(3, np.float32), "i": np.asarray([0, 2])}
FULL = [
    {
        "kind": "ablate",
        "hook": "blocks.0.attn.hook_z",
        "value": {"tensor": "a"},
        "heads": [0, -1],
        "positions": {"slice": [0, None, 2]},
        "dims": [True, False],
        "batch": 0,
        "strict": False,
        "allow_nonfinite": True,
    },
    {"kind": "patch", "hook": "hook_embed", "value": [[1, 2.5], [3, 4]], "positions": [[True, False], [False, True]]},
    {"kind": "steer", "hook": "h", "vector": {"number": "nan"}, "coefficient": 2, "positions": "generated"},
    {"kind": "scale", "hook": "h", "factor": 0.5, "heads": {"tensor": "i"}, "dims": None},
]


def whole(records: Any, **more: Any) -> dict[str, Any]:
    return {"format": interventions.FORMAT, "version": 1, "interventions": records, **more}


def agree(data: Any, arrays: dict[str, np.ndarray]) -> bool:
    """Whether a file has the right form; both readers of the schema must say the same, and the loader must follow."""
    right = bool(JUDGE.is_valid(data))
    found = fault(data)
    assert (found is None) == right, (data, found)
    said = refusal(data, arrays)
    assert (said is None) <= right, data
    assert said is None or not right or re.search(CONTENT, said), said
    assert "{found}" not in (said or "")
    assert "{field}" not in (said or "")
    return right


def refusal(data: Any, arrays: dict[str, np.ndarray]) -> str | None:
    """What the loader says of a file that it refuses."""
    try:
        interventions.from_json(json.dumps(data), arrays)
    except InputError as error:
        return str(error)
    return None


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(schema())
    schema()["properties"].clear()  # type: ignore[union-attr,call-arg]
    assert schema()["properties"], "each caller gets a copy"


def test_every_kind_and_field_is_told_as_its_class_has_it() -> None:
    assert definition("intervention")["properties"] == {"kind": {"enum": list(KINDS)}}
    for name, kind in KINDS.items():
        told: Any = definition(name)
        assert set(told["properties"]) == {"kind", *(field.name for field in fields(kind))}
        assert told["required"] == [field.name for field in fields(kind) if field.default is MISSING]
        for field in fields(kind):
            if "default" in told["properties"][field.name]:
                assert told["properties"][field.name]["default"] == field.default


@given(runs(MODEL, list(MODEL.hook_dict)))
def test_what_is_written_fits(run: tuple[np.ndarray, list[Any]]) -> None:
    text, tensors = interventions.to_json(run[1])
    assert agree(json.loads(text), tensors)


def test_what_is_saved_fits(tmp_path: Path) -> None:
    edits = interventions.from_json(json.dumps(whole(FULL[:2])), ARRAYS)
    path = interventions.save(edits, tmp_path / "edits.json")
    assert agree(json.loads(path.read_text()), {"0.value": ARRAYS["a"], "1.value": np.ones((2, 2))})


def test_the_examples_of_the_documentation_fit() -> None:
    page = (Path(__file__).parents[2] / "docs" / "edits.md").read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*?)```", page, re.S)
    assert len(examples) >= 2
    for example in examples:
        assert agree(json.loads(example), {"1.vector": np.ones(128)})


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1.0, 2.5, 2**62, 2**62 + 1, 10**30, "", "x", "prompt", "generated", "ablate", [], [[]], [0],
    [0, True], [True], [1.5], ["x"], [[True]], [[True], [False, True]], [[0]], [None], {}, {"tensor": "a"}, {"tensor": "i"},
    {"tensor": 1}, {"tensor": "a", "x": 1}, {"tensor": "gone"}, {"slice": [None, None, None]}, {"slice": [0, 1, 0]},
    {"slice": [0, 1]}, {"slice": [0, "x", 1]}, {"slice": "abc"}, {"slice": [True, 1, 1]}, {"slice": [0, 2, 1], "x": 0},
    {"number": "inf"}, {"number": "0.5"}, {"number": 1}, [1, [2, 3]], [{"tensor": "a"}], {"kind": "ablate", "hook": "h"},
]  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(inner, (*path, key))


def changed(data: Any, path: tuple[Any, ...], to: Any) -> Any:
    if not path:
        return to
    made = copy.deepcopy(data)
    at = made
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return made


def test_every_place_changed_to_every_value() -> None:
    data, right, wrong = whole(FULL), 0, 0
    assert agree(data, ARRAYS)
    for path in places(data):
        for value in VALUES:
            if agree(changed(data, path, value), ARRAYS):
                right += 1
            else:
                wrong += 1
    assert right > 100
    assert wrong > 500


def test_every_property_added_and_taken_away() -> None:
    names = sorted({name for kind in KINDS for name in definition(kind)["properties"]} | {"", "layers", "self"})  # type: ignore[union-attr]
    for record in FULL:
        for name in names:
            agree(whole([{**record, name: None}]), ARRAYS)
            agree(whole([{**record, name: 1}]), ARRAYS)
            agree(whole([{key: value for key, value in record.items() if key != name}]), ARRAYS)
    for name in ("format", "version", "interventions"):
        assert not agree({key: value for key, value in whole(FULL).items() if key != name}, ARRAYS)
    assert agree(whole(FULL, **{"$schema": "x", "more": [1]}), ARRAYS)


def hostile() -> Iterator[tuple[bytes, dict[str, np.ndarray]]]:
    """The edits files that the hostile group plays in CI: those that are text of JSON, with their arrays."""

    class Kept:
        def __init__(self, folder: Path) -> None:
            self.edits = folder / "edits.json"

    import tempfile

    for chunk in range(5):
        for spec in specs.drawn("edit files", chunk):
            with tempfile.TemporaryDirectory() as folder:
                place = Kept(Path(folder))
                spec_files.write_edits(spec, place)  # type: ignore[arg-type]
                yield place.edits.read_bytes(), spec["arrays"]


def test_every_bad_file_of_the_hostile_group() -> None:
    played = {True: 0, False: 0}
    for data, arrays in hostile():
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError):
            with pytest.raises(InputError):
                interventions.from_json(data.decode("utf-8", "replace"), arrays)
            continue
        played[agree(parsed, arrays)] += 1
    assert min(played.values()) > 50, played


def test_lists_nested_too_deeply_are_refused() -> None:
    value: Any = 1.0
    for _ in range(300):
        value = [value]
    with pytest.raises(InputError):
        interventions.from_json(json.dumps(whole([{"kind": "ablate", "hook": "h", "value": value}])))
