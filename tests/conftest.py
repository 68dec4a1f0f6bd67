"""Fixtures for every test: the embedded model, as a folder, opened, and as a copy that a test may damage."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import graphlens

pytest.register_assert_rewrite("tests.sweep_cases", "tests.damage", "tests.closeness", "tests.intervention_specs")
# Tests make and drop thousands of graphs, which are circles of objects. By Python's own thresholds the collector looks
# through all that pytest holds again and again.
gc.set_threshold(50_000, 20, 20)
# What a shell starts in the background ignores Ctrl-C, and Python then leaves it so: the tests of Ctrl-C would see none.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Scripts for mypy to read (reveal_type is no function), and those that a test plays in processes of their own. Several files are
# called conftest.py, and none has examples. TransformerLens 4 and SAELens live in environments of their own.
collect_ignore_glob = [
    "typing/*_script.py",
    "scripts/play*",
    "*/conftest.py",
    "transformerlens4/*.py",
    "saes/*_oracle.py",
]


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
def tiny() -> graphlens.HookedTransformer:
    from tests.models import MODEL

    return MODEL


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


# Of sweeps


@pytest.fixture(scope="session")
def clean() -> Mapping[str, Any]:
    """The clean run's activations of tests/sweep_cases.py."""
    from tests.sweep_cases import clean_activations

    return clean_activations()


@pytest.fixture
def no_flags() -> Iterator[None]:
    """Takes back the flags of the sweeps' model after a test."""
    from tests.sweep_cases import flags_off

    yield
    flags_off()


# Of refused files


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which anything starts to open a session."""

    def fail(*_: object, **__: object) -> None:
        pytest.fail("a session was opened")

    for name in ("graphlens.runtime.sessions.open_session", "graphlens.runtime.open_session"):
        monkeypatch.setattr(name, fail)
    monkeypatch.setattr("graphlens.engine.opener.open_session", fail)
    monkeypatch.setattr("onnxruntime.InferenceSession", fail)


@pytest.fixture
def outside(tiny_copy: Path) -> Path:
    """A folder beside the model's copy, with the same weights."""
    folder = tiny_copy.parent / "outside"
    folder.mkdir()
    shutil.copyfile(tiny_copy / "model.safetensors", folder / "model.safetensors")
    return folder
