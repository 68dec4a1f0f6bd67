"""Compares models with SAEs in them with SAELens's HookedSAETransformer: every hook point, logits, edits and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from graphlens import Ablate, HookedTransformer, Scale, metrics
from graphlens.torch import HookedTransformer as TorchModel
from tests.saes.sae_cases import D_HEAD, D_MLP, D_MODEL, HEADS, VOCABULARY, Case, cases

WORKER = Path(__file__).with_name("sae_splice_oracle.py")
CONFIG = {
    "n_layers": 3, "d_model": D_MODEL, "n_heads": HEADS, "d_head": D_HEAD, "d_mlp": D_MLP, "d_vocab": VOCABULARY,
    "n_ctx": 29, "act_fn": "gelu_new", "normalization_type": "LN", "seed": 0,
}  # fmt: skip
ABLATED = [3, 17, 40]
HEAD = """| SAE | place | error term | six hook points | logits | edited | gradients |
|---|---|---|---|---|---|---|"""
VALUES, GRADIENTS = 1e-5, 1e-4  # times max(1, max |expected|), and max |expected|


class Line(NamedTuple):
    """One SAE in a model: how far values and gradients are off; None where SAELens computes something else."""

    name: str
    place: str
    error_term: str
    hooks: float
    logits: float | None
    edited: float | None
    gradients: float | None

    @property
    def fails(self) -> bool:
        values = [each for each in (self.hooks, self.logits, self.edited) if each is not None]
        return max(values) > VALUES or (self.gradients or 0) > GRADIENTS

    def row(self) -> str:
        told = ["-" if each is None else f"{each:.0e}" for each in self[3:]]
        return f"| {' | '.join((*self[:3], *told))} |"


def compared(root: Path, run: Callable[[Path], None]) -> Iterator[Line]:
    """Every SAE at every place. ``run`` lets SAELens work on a folder."""
    model = TorchModel(dict(CONFIG))
    state = {
        name: np.array(value)
        for name, value in model.state_dict().items()
        if "mask" not in name and "IGNORE" not in name
    }
    random = np.random.default_rng(0)
    state = {name: value + (random.normal(size=value.shape) * 0.2).astype(value.dtype) for name, value in state.items()}
    model.load_state_dict({name: model.border.to_user(value) for name, value in state.items()}, strict=False)
    numpys: HookedTransformer[Any] = HookedTransformer(model.runner.engine)
    tokens = random.integers(1, VOCABULARY, (2, 6))
    np.savez(root / "weights.npz", **state)
    np.save(root / "tokens.npy", tokens)
    (root / "config.json").write_text(json.dumps(CONFIG))
    listed = []
    every = cases()
    for number, case in enumerate(every):
        case.sae.save(root / case.name)
        excluded = [int(tokens[0, 0]), int(tokens[1, 2])] if number % 3 == 0 else []
        listed.append(
            {"name": case.name, "folder": case.name, "writes": case.sae.cfg.writes, "error_term": case.error_term,
             "excluded": excluded, "ablated": ABLATED}
        )  # fmt: skip
    (root / "cases.json").write_text(json.dumps(listed))
    run(root)
    with np.load(root / "plain.npz") as file:
        assert _off(numpys(tokens), file["logits"]) <= VALUES, "the two models are one"
    for case, told in zip(every, listed, strict=True):
        with np.load(root / case.name / f"{case.name}.npz") as file:
            expected = {name: file[name] for name in file.files}
        yield _line(numpys, tokens, case, told["excluded"], expected)


def _line(
    model: HookedTransformer[Any], tokens: Any, case: Case, excluded: list[int], expected: dict[str, Any]
) -> Line:
    sae, at = case.sae, case.sae.cfg.writes
    with model.saes(sae, use_error_term=case.error_term, exclude_special_tokens=excluded):
        logits, cache = model.run_with_cache(tokens)
        with model.intervene([Ablate(f"{at}.hook_sae_acts_post", dims=ABLATED), Scale(f"{at}.hook_sae_recons", 1.5)]):
            edited = model(tokens)
        names = [name for name in expected if name.startswith("grad.")]
        hooks = [f"{at}.{name.removeprefix('grad.')}" for name in names]
        found = model.gradients(tokens, metrics.LogitDiff([3, 3], [7, 7]), names=hooks)
    # SAELens's wrapper leaves a transcoder's skip out, which its own forward adds.
    skips = sae.cfg.has_skip
    compared = [
        name for name in expected if name.startswith("hook_sae") and not (skips and name.endswith(("error", "output")))
    ]
    assert {name.rpartition(".")[2] for name in cache if "hook_sae" in name} == {
        n for n in expected if n.startswith("hook_sae")
    }
    gradients = max(
        float(np.abs(found[hook] - expected[name]).max() / np.abs(expected[name]).max())
        for name, hook in zip(names, hooks, strict=True)
    )
    kind, _, place = case.name.removesuffix("-error").rpartition("-")
    return Line(
        kind,
        place,
        "yes" if case.error_term else "no",
        max(_off(cache[f"{at}.{name}"], expected[name]) for name in compared),
        None if skips and not case.error_term else _off(logits, expected["logits"]),
        None if skips else _off(edited, expected["edited"]),
        None if skips else gradients,
    )


def _off(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
