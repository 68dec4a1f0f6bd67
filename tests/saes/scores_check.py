"""Compares the scores of SAEs with those of SAELens's own evaluations, for every architecture and place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from graphlens import HookedTransformer, sae_scores
from graphlens.torch import HookedTransformer as TorchModel
from tests.saes.sae_cases import VOCABULARY, cases
from tests.saes.splicing_check import CONFIG

WORKER = Path(__file__).with_name("sae_scores_oracle.py")
HEAD = """| SAE | scores | furthest | off by, of what is allowed |
|---|---|---|---|"""
TOLERANCE = 1e-5  # times max(1, |expected|)
QUOTIENTS = ("relative_reconstruction_bias", "ce_loss_score")  # of numbers that nearly cancel, in SAELens's float32
LOOSER = 1e-3
BATCHES, SIZE, LENGTH = 3, 4, 9


class Line(NamedTuple):
    """One SAE: how many scores there are, and which is furthest off, as a share of what is allowed."""

    name: str
    count: int
    furthest: str
    off: float

    @property
    def fails(self) -> bool:
        return not self.off <= 1

    def row(self) -> str:
        return f"| {self.name} | {self.count} | `{self.furthest}` | {self.off:.2f} |"


def compared(root: Path, run: Callable[[Path], None]) -> Iterator[Line]:
    """The scores of every SAE but transcoders, which SAELens compares with what they read. ``run`` lets SAELens work."""
    model = TorchModel(dict(CONFIG))
    random = np.random.default_rng(0)
    state = {
        name: np.array(value) + (random.normal(size=value.shape) * 0.2).astype(np.float32)
        for name, value in model.state_dict().items()
        if "mask" not in name and "IGNORE" not in name
    }
    model.load_state_dict({name: model.border.to_user(value) for name, value in state.items()}, strict=False)
    numpys: HookedTransformer[Any] = HookedTransformer(model.runner.engine)
    tokens = random.integers(1, VOCABULARY, (BATCHES, SIZE, LENGTH))
    np.savez(root / "weights.npz", **state)
    np.save(root / "tokens.npy", tokens)
    (root / "config.json").write_text(json.dumps(CONFIG))
    every = [case for case in cases() if not case.error_term and not case.sae.cfg.is_transcoder]
    listed = []
    for number, case in enumerate(every):
        case.sae.save(root / case.name)
        excluded = [int(tokens[0, 0, 0]), int(tokens[1, 2, 3])] if number % 2 else []
        listed.append({"name": case.name, "folder": case.name, "excluded": excluded})
    (root / "cases.json").write_text(json.dumps(listed))
    run(root)
    expected = json.loads((root / "scores.json").read_text())
    for case, told in zip(every, listed, strict=True):
        found = sae_scores(
            numpys, case.sae, tokens.reshape(-1, LENGTH), exclude_special_tokens=told["excluded"], batch_size=SIZE
        )
        wanted = expected[case.name]
        density = np.abs(found.density - wanted.pop("density")).max()
        apart = {name: abs(getattr(found, name) - value) / max(1.0, abs(value)) for name, value in wanted.items()}
        apart["density"] = float(density)
        apart = {name: off / (LOOSER if name in QUOTIENTS else TOLERANCE) for name, off in apart.items()}
        furthest = max(apart, key=lambda name: apart[name] if apart[name] == apart[name] else np.inf)
        yield Line(case.name, len(apart), furthest, apart[furthest])
