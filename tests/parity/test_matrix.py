"""The parity matrix: every hook name, read and edited, processed and not, is TransformerLens 3.9's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matrix import FLAG_SETS, MODELS, TOLERANCE, Pair, prompt, remembered_pair


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(autouse=True)
def cache_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(work / "cache"))


def assert_parity(pair: Pair, tokens: np.ndarray, edit: bool = True, mask: np.ndarray | None = None) -> int:
    found = list(pair.differences(tokens, edit, mask))
    bad = [difference for difference in found if not max(difference.read, difference.edited) <= TOLERANCE]
    assert not bad, bad
    return len(found)


@pytest.mark.parametrize("flags", FLAG_SETS, ids=str)
@pytest.mark.parametrize("processed", [False, True], ids=["unprocessed", "processed"])
@pytest.mark.parametrize("model", MODELS)
def test_every_hook_point_is_transformerlenss_read_and_edited(
    model: str, processed: bool, flags: str, work: Path
) -> None:
    pair = remembered_pair(model, processed, work)
    pair.set_flags(FLAG_SETS[flags])
    count = assert_parity(pair, prompt(pair, 2, 9))
    assert count > 17 * pair.ours.cfg.n_layers + 6


@pytest.mark.parametrize("processed", [False, True], ids=["unprocessed", "processed"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (2, 33)], ids=str)
def test_every_shape_of_input(shape: tuple[int, int], processed: bool, work: Path) -> None:
    pair = remembered_pair("odd, gelu_new", processed, work)
    pair.set_flags(())
    assert_parity(pair, prompt(pair, *shape), edit=False)


@pytest.mark.parametrize("flags", FLAG_SETS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_read_and_edited(side: str, flags: str, work: Path) -> None:
    pair = remembered_pair("odd, gelu_new", False, work)
    pair.set_flags(FLAG_SETS[flags])
    lengths = np.asarray([8, 5, 1])
    index = np.arange(8)
    mask = (index >= 8 - lengths[:, None]) if side == "left" else (index < lengths[:, None])
    assert_parity(pair, prompt(pair, 3, 8), mask=mask.astype(np.int64))
