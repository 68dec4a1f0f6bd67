"""The page's edits.js in Node: a run is fed the gates that Python makes of the same edits.

    python -m pytest tests/live/edits_in_node.py

It needs Node, so no test run collects it by itself.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import graphlens
from graphlens import Ablate, Patch, Scale, Steer
from graphlens.edits import gate
from graphlens.file.names import axis_sizes
from graphlens.interventions import Intervention, save
from graphlens.surgery.files import load
from graphlens.surgery.graph import read_manifest
from tests.live.page_models import inline

SOURCES = Path(graphlens.__file__).parent / "views" / "live"


def ran(folder: Path, script: str) -> Any:
    """What a script prints, as JSON; it imports ./edits.mjs."""
    (folder / "edits.mjs").write_text((SOURCES / "edits.js").read_text())
    (folder / "run.mjs").write_text(script)
    done = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def random_edit(
    rng: np.random.Generator, hook: str, axes: tuple[str, ...], sizes: dict[str, int], length: int
) -> Intervention:
    """An edit with selections and an operand of every form."""
    fields: dict[str, Any] = {}
    shape: list[int] = []
    for axis, name in enumerate(axes):
        size = length if name == "pos" else 1 if name == "batch" else sizes[name]
        field = gate.selected_by(axes).get(name)
        form = 0 if name == "batch" else rng.integers(0, 7)
        kept = size
        if form == 1:
            fields[str(field)], kept = int(rng.integers(-size, size)), 0
        elif form == 2:
            fields[str(field)] = (chosen := rng.permutation(size)[: rng.integers(1, size + 1)].tolist())
            kept = len(chosen)
        elif form == 3:
            cut = slice(int(rng.integers(-size, size)), None, int(rng.choice([1, 2, -1])))
            fields[str(field)], kept = cut, len(range(*cut.indices(size)))
        elif form == 4 and axis:
            mask = rng.random(size) < 0.5
            mask[rng.integers(size)] = True
            fields[str(field)], kept = mask.tolist(), int(mask.sum())
        elif form == 5:  # an index may be listed twice, and from either end
            fields[str(field)] = (chosen := rng.integers(-size, size, rng.integers(2, 5)).tolist())
            kept = len(chosen)
        if kept:
            shape.append(kept)
    shape = [1 if rng.random() < 0.3 else size for size in shape][int(rng.integers(0, len(shape) + 1)) :]
    operand: Any = rng.standard_normal(shape).astype(np.float32) if shape else float(rng.standard_normal())
    kind = (Ablate, Patch, Scale, Steer)[rng.integers(4)]
    return kind(hook, operand, **fields)


def test_edits_come_to_the_same_gate_as_in_python(tmp_path: Path) -> None:
    manifest = read_manifest(load(graphlens.embedded_model()))
    sizes, rng, length = axis_sizes(manifest.config), np.random.default_rng(11), 6
    window, cases, wanted = gate.Window.whole(1, length), [], []
    for _ in range(300):
        hook = ("blocks.0.attn.hook_z", "blocks.1.hook_resid_mid")[rng.integers(2)]
        entry = manifest.hooks[hook]
        items = [random_edit(rng, hook, entry.axes, sizes, length) for _ in range(rng.integers(1, 4))]
        full = [1 if name == "batch" else length if name == "pos" else sizes[name] for name in entry.axes]
        cases.append({"text": inline(items), "hook": hook, "axes": entry.axes, "length": length})
        cases[-1]["sizes"] = [0 if name == "pos" else size for name, size in zip(entry.axes, full, strict=True)]
        wanted.append(
            {key: np.broadcast_to(array, full) for key, array in gate.compose(items, entry, sizes, window).items()}
        )
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    answers = ran(
        tmp_path,
        """import { readFileSync } from "node:fs";
        import { gate, readEdits, writeEdits } from "./edits.mjs";
        const found = JSON.parse(readFileSync("cases.json")).map(({ text, hook, axes, sizes, length }) => {
          const hooks = { [hook]: { axes, sizes } };
          const edits = readEdits(writeEdits(readEdits(text, hooks)), hooks);
          const parts = gate(edits, hooks[hook], length);
          return Object.fromEntries(Object.entries(parts).filter(([, v]) => v).map(([k, v]) => [k, [...v]]));
        });
        console.log(JSON.stringify(found));""",
    )
    kinds = set()
    for case, found, expected in zip(cases, answers, wanted, strict=True):
        found.pop("sizes")
        assert found.keys() == expected.keys(), case["text"]
        where = expected.get("where")
        for key, array in expected.items():
            given = np.array(found[key]).reshape(array.shape)
            seen = where if key == "patch" else np.ones(array.shape, bool)  # elsewhere a patch means nothing
            np.testing.assert_allclose(given[seen], array[seen], rtol=2e-6, atol=1e-6, err_msg=case["text"])
            kinds.add(key)
    assert kinds == {"scale", "add", "where", "patch"}


def test_a_file_of_edits_takes_the_arrays_of_its_own_save(tmp_path: Path) -> None:
    """Every save calls its first array "0.vector": chosen together, two of them must not take each other's."""
    for name, number in (("a", 1.0), ("b", 2.0)):
        save(Steer("blocks.1.hook_resid_mid", np.full(4, number)), tmp_path / f"{name}.json")
    shutil.copy(tmp_path / "b.safetensors", tmp_path / "renamed.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "stale.safetensors")
    shutil.copy(tmp_path / "b.json", tmp_path / "stale.json")
    found = ran(
        tmp_path,
        """import { readFileSync } from "node:fs";
        import { besideOf, readEdits, readSafetensors } from "./edits.mjs";
        const hooks = { "blocks.1.hook_resid_mid": { axes: ["batch", "pos", "d_model"], sizes: [1, 0, 4] } };
        async function opened(jsons, arrays) {
          const files = arrays.map((name) => [name, new Uint8Array(readFileSync(name))]);
          const found = {};
          for (const name of jsons) {
            const text = readFileSync(name, "utf-8");
            try {
              const beside = await besideOf(name, text, files, jsons.length - 1);
              const [edit] = readEdits(text, hooks, beside === null ? {} : readSafetensors(beside[1], beside[0]));
              found[name] = edit.operand.data[0];
            } catch (error) { found[name] = error.message; }
          }
          return found;
        }
        console.log(JSON.stringify([
          await opened(["a.json", "b.json"], ["b.safetensors", "a.safetensors"]),
          await opened(["b.json"], ["renamed.safetensors"]),
          await opened(["a.json", "b.json"], ["renamed.safetensors"]),
          await opened(["stale.json"], ["stale.safetensors"]),
        ]));""",
    )
    assert found[0] == {"a.json": 1, "b.json": 2}
    assert found[1] == {"b.json": 2}
    assert all("lies in the .safetensors file beside it" in said for said in found[2].values())
    assert "stale.safetensors: damaged, or of another save than stale.json" in found[3]["stale.json"]
