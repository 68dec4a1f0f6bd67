"""Exports of the variants, each made once for all workers of a test run, and what they are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphlens import HookedTransformer
from tests.families.exports import checkpoint_of, hooked_of

# The matrices are tiny: a second thread costs more in waiting than it computes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def families_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all variants; GRAPHLENS_FAMILIES_ROOT keeps it from one run to the next."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    root = Path(os.environ.get("GRAPHLENS_FAMILIES_ROOT") or shared / "families")
    root.mkdir(parents=True, exist_ok=True)
    return root


@pytest.fixture(scope="session")
def family_checkpoint(families_root: Path) -> Callable[[str], Path]:
    """The checkpoint folder of a variant, by its name."""
    return lambda name: checkpoint_of(name, families_root)


@pytest.fixture(scope="session")
def family_folder(families_root: Path) -> Callable[[str], Path]:
    """The hooked folder of a variant, verified, by its name. Tests read it and change nothing in it."""
    return lambda name: hooked_of(name, families_root)


@pytest.fixture(scope="session")
def family_model(family_folder: Callable[[str], Path]) -> Callable[[str], HookedTransformer]:
    """A variant opened for NumPy, by its name: a new object each time, so a test may set its flags."""
    return lambda name: HookedTransformer.from_onnx(family_folder(name), "cpu")


@pytest.fixture(scope="session")
def family_reference(family_checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """transformers' model of a variant in float32 with eager attention, by its name: a new object each time."""
    from tests.families.exports import reference_of

    return lambda name: reference_of(family_checkpoint(name))
