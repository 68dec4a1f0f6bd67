"""A kind of edit that a user defines in one class: it runs, prints, is saved, baked and folded as the others are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

import graphlens
from graphlens import Ablate, Patch, Scale, Steer, interventions, surgery
from graphlens.cli.app import app
from graphlens.deploy import bake_model, write_stripped
from graphlens.edits.parts import PartName
from graphlens.errors import InputError
from graphlens.interventions import Intervention, unregister
from graphlens.metrics import LogitDiff
from graphlens.patching import get_act_patch_resid_pre
from tests.intervention_specs import close, plain_session, set_flags
from tests.models import MODEL

Z, RESID = "blocks.1.attn.hook_z", "blocks.2.hook_resid_post"
VECTOR = np.random.default_rng(5).standard_normal(MODEL.cfg.d_model)  # LayerNorm would absorb a constant one


@pytest.fixture(autouse=True)
def no_flags() -> Iterator[None]:
    yield
    set_flags(MODEL, ())


@pytest.fixture
def negate() -> Iterator[type[Intervention]]:
    @dataclass(frozen=True, eq=False, repr=False)
    class Negate(Intervention):
        """Multiplies by 1 - 2 * amount: 1 negates, 0 changes nothing."""

        kind: ClassVar[str] = "negate"
        operand: ClassVar[str] = "amount"
        part: ClassVar[PartName] = "scale"

        amount: float = 1.0

        @property
        def array(self) -> np.ndarray:
            return 1 - 2 * np.asarray(self.amount, np.float64)

    yield Negate
    unregister(Negate)


def test_it_runs_among_the_others(negate: Any, tokens: np.ndarray) -> None:
    def at(*edits: Any) -> list[tuple[str, Any]]:
        return [(RESID, edit) for edit in edits]

    def negated(x: np.ndarray, hook: Any) -> np.ndarray:
        return -x

    def half_negated(x: np.ndarray, hook: Any) -> None:
        x[:, 2:4] *= 1 - 2 * 0.25

    def steered(x: np.ndarray, hook: Any) -> np.ndarray:
        return x + VECTOR.astype(np.float32)

    def patched(x: np.ndarray, hook: Any) -> None:
        x[:, 2] = 0.5

    whole, half = negate(RESID), negate(RESID, positions=[2, 3], amount=0.25)
    steer, patch = Steer(RESID, VECTOR), Patch(RESID, 0.5, positions=2)
    as_hooks = {whole: negated, half: half_negated, steer: steered, patch: patched}
    results = []
    for items in (
        [whole],
        [half, steer],
        [steer, patch, whole, half],
        [whole, half, patch, steer],
        [half, patch, half],
    ):
        expected = MODEL.run_with_hooks(tokens, fwd_hooks=at(*(as_hooks[item] for item in items)))
        close(MODEL.run_with_interventions(tokens, items), expected)
        with MODEL.intervene(items[:-1]), MODEL.intervene(items[-1]):
            close(MODEL(tokens), expected)
        results.append(expected)
    assert len({result.tobytes() for result in results}) == len(results)
    with pytest.raises(InputError, match="there is no 9"):
        MODEL.run_with_interventions(tokens, negate(RESID, positions=9))
    set_flags(MODEL, ("use_hook_tokens",))
    with pytest.raises(InputError, match="Negate at 'hook_tokens': this hook point holds integers, which only Patch"):
        MODEL.run_with_interventions(tokens, negate("hook_tokens"))


def test_it_is_baked_and_folded(negate: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    folded, nodes = [negate(Z, heads=1), Scale(Z, 0.5)], [Steer(RESID, VECTOR), negate(RESID, positions=-1)]
    source = graphlens.embedded_model()
    plain = surgery.load_plain(write_stripped(source, tmp_path / "plain"))
    for name, items in (("folded", folded), ("nodes", nodes)):
        folder = bake_model(source, items, tmp_path / name)
        found = plain_session(folder).run(["logits"], {"input_ids": tokens})[0]
        close(found, MODEL.run_with_interventions(tokens, items))
        assert np.abs(found - MODEL(tokens)).max() > 1e-3
        assert (len(surgery.load_plain(folder).graph) == len(plain.graph)) == (name == "folded")


def test_the_command_line_bakes_it(negate: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    items = [negate(Z, heads=1), negate(RESID, amount=0.25, positions=[1, -1])]
    edits = interventions.save(items, tmp_path / "edits.json")
    source = str(graphlens.embedded_model())
    done = CliRunner().invoke(app, ["bake", source, str(edits), "-o", str(tmp_path / "baked")])
    assert done.exit_code == 0, done.output
    close(
        plain_session(tmp_path / "baked").run(None, {"input_ids": tokens})[0],
        MODEL.run_with_interventions(tokens, items),
    )


def test_gradients_and_sweeps_go_through_it(negate: Any, tokens: np.ndarray) -> None:
    corrupted = tokens.copy()
    corrupted[:, 1] = (corrupted[:, 1] + 1) % MODEL.cfg.d_vocab
    metric = LogitDiff([5] * len(tokens), [9] * len(tokens))
    _, clean = MODEL.run_with_cache(tokens)
    found = []
    for edit in (negate(RESID, amount=0.25), Scale(RESID, 0.5)):
        with MODEL.intervene(edit), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the sweep takes whole runs
            gradient = MODEL.gradients(tokens, metric, [Z])[Z]
            found.append((gradient, np.asarray(get_act_patch_resid_pre(MODEL, corrupted, clean, metric))))
    for own, built_in in zip(*found, strict=True):
        assert np.abs(own).max() > 0
        np.testing.assert_array_equal(own, built_in)


def test_it_is_a_record_and_a_file(negate: Any, tmp_path: Path) -> None:
    items = [negate(Z, heads=[0, 2]), Ablate(Z), negate(RESID, amount=0.25, strict=False)]
    assert repr(items[0]) == f"Negate({Z!r}, heads=(0, 2), amount=1.0)"
    assert len({*items, negate(Z, heads=[0, 2]), negate(Z, heads=[0, 2], amount=0.5)}) == 4
    text, tensors = interventions.to_json(items)
    assert interventions.from_json(text, tensors) == items
    assert interventions.load(interventions.save(items, tmp_path / "edits.json")) == items
    with pytest.raises(InputError, match="NaN"):
        negate(Z, amount=float("nan"))
    with pytest.raises(InputError, match="is Ablate, Patch, Steer, Scale or Negate, not int"):
        interventions.to_json([3])  # type: ignore[list-item]
    unregister(negate)
    with pytest.raises(InputError, match="kind 'negate'; there is ablate, patch, steer, scale"):
        interventions.from_json(text, tensors)


def test_it_is_registered_once_and_says_what_it_is(negate: Any) -> None:
    said = {"kind": "negate", "operand": "value", "part": "scale"}
    with pytest.raises(InputError, match=r"called 'negate' already: Negate.*interventions\.unregister"):
        type("Negate", (Intervention,), said)
    for wrong in ({"part": "divide"}, {"operand": ""}, {"kind": ""}):
        with pytest.raises(InputError, match="names its kind, its operand, and as its part one of scale, add, patch"):
            type("Shift", (Intervention,), {**said, "kind": "shift", **wrong})
    type("Loud", (negate,), {})  # a subclass without a name of its own is no kind of its own
    assert list(interventions.KINDS) == ["ablate", "patch", "steer", "scale", "negate"]
