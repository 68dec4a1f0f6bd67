"""Fixtures for every test: the embedded model, as a folder, opened, and as a copy that a test may damage."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import graphlens


class _RefuseTorch:
    """An import hook under which torch and transformers do not exist, and asking for them is recorded as an error."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"{name} was imported where only the [cpu] extra may be needed", name=name)


if os.environ.get("GRAPHLENS_REFUSE_TORCH"):
    sys.meta_path.insert(0, _RefuseTorch())  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    return graphlens.embedded_model()


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> graphlens.HookedTransformer:
    return graphlens.HookedTransformer.from_onnx(tiny_folder, "cpu")


@pytest.fixture
def tiny_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model's folder, no byte shared with the original."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def tokens(tiny: graphlens.HookedTransformer) -> npt.NDArray[np.int64]:
    """Two prompts of six tokens, read-only."""
    array = np.random.default_rng(0).integers(0, tiny.cfg.d_vocab, (2, 6))
    array.setflags(write=False)
    return array
