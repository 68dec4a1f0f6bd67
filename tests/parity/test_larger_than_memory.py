"""A model of 608 MB of weights, run by a process that may take 300 MB beyond its interpreter."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scale import streaming_check as check

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="what a process may take is limited and read as Linux does it"
)
LIMIT = 300_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hooked folder, and beside it what a process without a limit computed."""
    workdir = tmp_path_factory.mktemp("large")
    folder, size = check.made(workdir, check.SMALL)
    assert size > 600_000_000
    whole = check.run_limited(folder, None, workdir / "whole.npz")
    assert whole.limited_by == "nothing"
    assert whole.beyond > size, "without a limit the weights are in memory"
    yield folder
    shutil.rmtree(workdir)  # pytest would keep it


@pytest.mark.parametrize("groups", [True, False], ids=["cgroup", "RLIMIT_DATA"])
def test_a_model_runs_in_half_the_memory_of_its_weights(model: Path, tmp_path: Path, groups: bool) -> None:
    found = check.run_limited(model, LIMIT, tmp_path / "streamed.npz", groups=groups)
    assert found.limited_by == "RLIMIT_DATA" or groups
    assert found.beyond < LIMIT, found
    assert found.peak_anonymous - found.interpreter < LIMIT, found
    apart = check.largest_difference(model.parent / "whole.npz", tmp_path / "streamed.npz")
    assert set(apart) == {
        "logits", "ablated", "hooked", "gradient", "blocks.6.hook_resid_pre", "blocks.6.attn.hook_pattern",
    }  # fmt: skip
    assert max(apart.values()) < check.TOLERANCE, apart


def test_the_limit_keeps_the_model_from_being_run_whole(model: Path, tmp_path: Path) -> None:
    """So the limit is one: without max_memory the process ends, or says that there is not enough memory."""
    with pytest.raises(RuntimeError, match="the process ended with"):
        check.run_limited(model, LIMIT, tmp_path / "none.npz", groups=False, max_memory=10 * LIMIT)
