"""Compares SAEs that graphlens opened with the values that their own library wrote beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from graphlens import Sae

TOLERANCE = 1e-5  # times max(1, max |expected|)


class Compared(NamedTuple):
    """One SAE's comparison: how far the farthest value lies, in units of max(1, max |expected|), and of how many arrays."""

    name: str
    oracle: str
    farthest: float
    arrays: tuple[str, ...]


def farthest(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest error of any array, each relative to max(1, max |expected|). Raises AssertionError for other shapes."""
    worst = 0.0
    for name, array in expected.items():
        assert found[name].shape == array.shape, (name, found[name].shape, array.shape)
        assert np.isfinite(array).all(), name
        assert np.abs(array).max() > 0 or name == "hook_sae_error", name
        worst = max(worst, float(np.abs(found[name] - array).max() / max(1.0, np.abs(array).max())))
    return worst


def all_values(sae: Sae, x: np.ndarray) -> dict[str, np.ndarray]:
    """What graphlens makes of activations, by the names that the oracle uses."""
    features = sae.encode(x)
    found = sae.values(x, error_term=not sae.cfg.is_transcoder)
    return {**found, "encode": features, "decode": sae.decode(features), "whole": sae(x)}


def compared(root: Path) -> Iterator[Compared]:
    """Each SAE that the oracle wrote below ``root``. Raises AssertionError for other shapes."""
    for made in json.loads((root / "list.json").read_text()):
        folder = root / made["folder"]
        with np.load(folder / "values.npz") as file:
            expected = {name: file[name] for name in file.files}
        x = expected.pop("x")
        sae = Sae.from_folder(folder, **made["asked"])
        yield Compared(made["name"], made["oracle"], farthest(all_values(sae, x), expected), tuple(expected))
