"""The benchmark tool's comparison of two commits: each side runs its own package, rows pair up, and the verdict's rule."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tools is no part of the package

from tools.bench import commits, harness, ratios, standin, trees  # noqa: E402
from tools.bench.__main__ import case_names, load_case, run_against  # noqa: E402
from tools.bench.children import ChildRun  # noqa: E402
from tools.bench.ratios import Comparison, Pairs  # noqa: E402

CASES = ("cold_start", "full_cache", "generation", "gradients", "import_time", "new_gate", "one_edit", "one_hook",
         "sweep_resid_pre")  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[trees.Tree, trees.Tree]:
    """Two trees, the older of which says so in its version: copies, so that no git history is needed."""
    home = tmp_path_factory.mktemp("trees").resolve()
    found = tuple(trees.make_tree(home, name, name) for name in ("old", "new"))
    for tree in found:
        trees.copy_package(ROOT, tree.folder)
    version = found[0].folder / "graphlens" / "file" / "version.py"
    version.write_text(version.read_text().replace('__version__ = "', '__version__ = "0.0.0.old+'))
    return found


def _version() -> list[str]:
    import graphlens
    from tools import bench

    return [graphlens.__version__, graphlens.__file__, bench.__file__]


def test_each_tree_imports_its_own_package_and_this_tools_code(both: tuple[trees.Tree, trees.Tree]) -> None:
    for tree in both:
        version, package, tool = tree.child(_version).result
        assert version.startswith("0.0.0.old+") == (tree.name == "old")
        assert Path(package).is_relative_to(tree.folder)
        assert Path(tool).is_relative_to(ROOT)
        tree.require(package)
    with pytest.raises(trees.WrongTree, match="new should import graphlens from"):
        both[1].require(both[0].child(_version).result[1])


def test_rows_pair_up(both: tuple[trees.Tree, trees.Tree], tmp_path: Path) -> None:
    case, summary = load_case("full_cache")
    setup = harness.Setup(standin.prepare("tiny", tmp_path), 1)
    found = commits.compare("full_cache", summary, case, setup, both)
    assert (found.old, found.new, found.starts) == ("old", "new", 1)
    assert [row.label for row in found.rows] == ["b1 s16", "b8 s32", "b1 s128"]
    for row in found.rows:
        assert len(row.old) == len(row.new) == 1
        assert min(*row.old, *row.new) > 0
    assert found.notes == ["Results differ from old's by at most 0e+00 of the largest: new."]


def test_rows_of_fresh_processes_pair_up(tmp_path: Path) -> None:
    spawned = []

    class Fake(trees.Tree):
        def child(self, function: object, *arguments: object) -> ChildRun:
            spawned.append(self.name)
            return ChildRun(None, 1.0 if self.name == "old" else 1.5, 0.5, 0)

    sides = tuple(Fake(name, name, tmp_path, tmp_path) for name in ("old", "new"))
    case, summary = load_case("import_time")
    setup = harness.Setup(standin.prepare("tiny", tmp_path), 4)
    found = commits.compare("import_time", summary, case, setup, sides)
    turns = spawned[::2]  # two imports a turn
    assert turns[::2] != turns[1::2]
    assert turns.count("old") == turns.count("new") == 5  # one warms up
    assert [row.label for row in found.rows][::2] == ["import graphlens", "from graphlens import HookedTransformer"]
    assert [(row.old, row.new) for row in found.rows[:2]] == [([1.0] * 4, [1.5] * 4), ([0.5] * 4, [1.0] * 4)]
    assert found.starts == 4


def test_the_cases_that_can_be_compared() -> None:
    assert tuple(name for name in case_names() if commits.comparable(load_case(name)[0])) == CASES


def test_a_case_that_cannot_and_a_commit_that_is_not(tmp_path: Path) -> None:
    from rich.console import Console
    from typer import BadParameter

    with pytest.raises(BadParameter, match=r"'export' cannot be measured on one commit alone\. There are: cold_start"):
        run_against("export", "HEAD", "tiny", 1, tmp_path, Console())
    with pytest.raises(SystemExit, match="git rev-parse ended with"), trees.both_trees("no-such-commit", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git history here")
def test_a_commits_tree_is_checked_out_and_removed(tmp_path: Path) -> None:
    with trees.both_trees("HEAD", tmp_path) as (old, new):
        listed = subprocess.run(["git", "ls-files", "graphlens"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {f"graphlens/{path.name}" for path in (old.folder / "graphlens").glob("*.py")} <= {
            *listed.stdout.split()
        }
        assert (new.folder / "models" / "tiny-gpt2" / "model.onnx").is_file()
        assert old.commit == new.commit.rstrip("+")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("new", "met"),
    [
        ([10.0] * 9, True),
        ([10.2] * 9, True),  # 2 % slower each time
        ([10.4] * 9, False),
        ([8.0, 14.0] * 4 + [14.0], True),  # slower in the median, and nobody can tell
        ([5.0] * 9, True),
    ],
)
def test_the_verdict(new: list[float], met: bool) -> None:
    row = Pairs("b1 s16", "ms", [10.0] * 9, new)
    spread = row.spread()
    assert spread is not None
    assert spread.met == met
    assert spread.extremes == (min(new) / 10, max(new) / 10)
    assert spread.extremes[0] <= spread.interval[0] <= spread.median <= spread.interval[1] <= spread.extremes[1]
    assert spread.quartiles[0] <= spread.median <= spread.quartiles[1]


def test_a_pairs_ratio_is_its_own() -> None:
    spread = Pairs("drifts", "ms", [10.0, 20.0, 40.0], [11.0, 22.0, 44.0]).spread()
    assert spread is not None
    assert spread.extremes == pytest.approx((1.1, 1.1))
    assert Pairs("differences", "s", [-0.1], [0.2]).spread() is None


def test_a_comparison_is_shown_and_written() -> None:
    from io import StringIO

    from rich.console import Console

    rows = [Pairs("b1 s16", "ms", [10.0] * 3, [9.0] * 3), Pairs("b8 s32", "ms", [10.0] * 3, [12.0] * 3)]
    rows.append(Pairs("differences", "s", [-0.1], [0.2]))
    found = Comparison("one_hook", "Hooks.", "tiny", 3, 1, "abc", "def+", rows, {"CPU": "one"}, ["A note."])
    out = StringIO()
    ratios.show(found, Console(file=out, width=200))
    page = ratios.to_markdown([found])
    assert "| CPU | one |" in page
    for text in (out.getvalue(), page):
        assert "abc (old) against def+ (new)" in text
        assert "0.900x" in text
        assert "A note." in text
        assert "one_hook: ratio <= 1.03 or spread includes 1: NOT in b8 s32" in text
    assert "| b8 s32 | 10.0 ms | 12.0 ms | 1.200x | 1.200-1.200 | 1.200-1.200 | 1.200-1.200 | over |" in page
    (written,) = json.loads(ratios.to_json([found]))
    assert [row["spread"] and row["spread"]["met"] for row in written["rows"]] == [True, False, None]
    assert written["rows"][0]["new"] == [9.0] * 3
