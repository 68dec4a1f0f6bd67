"""``graphlens report``: the numbers in its page are the API's; what cannot be is said before work starts."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, adopt
from graphlens.attribution import attribution_patch, direct_logit_attribution, edge_attribution
from graphlens.metrics import LogitDiff
from graphlens.patching import act_patch_sites, sweep
from tests.command_line import graphlens, sentence

PROMPT = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
COMMITTED = Path(__file__).parents[1] / "adopt" / "committed"
PAIR = ("--clean", PROMPT, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong", " John")


def views_of(page: Path) -> list[dict[str, Any]]:
    """The views of a page: kind, and data with its arrays decoded."""
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="graphlens-data">(.*?)</script>', text)
    assert found

    def decoded(item: Any) -> Any:
        if isinstance(item, dict) and item.keys() == {"t", "b"}:
            return np.frombuffer(base64.b64decode(item["b"]), f"<{item['t']}")
        if isinstance(item, dict):
            return {key: decoded(value) for key, value in item.items()}
        return [decoded(value) for value in item] if isinstance(item, list) else item

    return [decoded(view) for view in json.loads(found[1])["views"]]


def test_a_prompt(tiny: HookedTransformer, tmp_path: Path) -> None:
    done = graphlens("report", "tiny-gpt2", PROMPT, "-o", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 views of 15 tokens -> ")
    attention, lens, text = views_of(tmp_path / "a.html")
    assert [view["kind"] for view in (attention, lens, text)] == ["attention", "lens", "text"]
    _, cache = tiny.run_with_cache(PROMPT)
    rows, columns = np.tril_indices(15)
    patterns = np.stack([cache["pattern", layer][0] for layer in range(4)])
    np.testing.assert_array_equal(attention["data"]["patterns"], patterns[:, :, rows, columns].ravel())
    assert attention["data"]["tokens"] == tiny.to_str_tokens(PROMPT)
    loss = np.asarray(tiny(PROMPT, return_type="loss", loss_per_token=True))[0]
    np.testing.assert_array_equal(text["data"]["values"]["loss (nats)"], [np.nan, *loss])
    assert f"<h1>{PROMPT}</h1>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_pair(tiny: HookedTransformer, tmp_path: Path) -> None:
    done = graphlens("report", "tiny-gpt2", *PAIR, "-o", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    _, _, _, direct, residual, heads, estimate, circuit = (view["data"] for view in views_of(tmp_path / "a.html"))
    metric = LogitDiff(" Mary", " John")
    np.testing.assert_array_equal(direct["values"], direct_logit_attribution(tiny, PROMPT, metric).values)
    logits, cache = tiny.run_with_cache(PROMPT)
    clean, base = (
        float(metric.bound(tiny.to_single_token)(logits)),
        float(metric.bound(tiny.to_single_token)(tiny(CORRUPTED))),
    )
    ids = tiny.to_tokens(CORRUPTED)
    for found, name, by in (
        (residual, "resid_pre", sweep),
        (heads, "attn_head_out_all_pos", sweep),
        (estimate, "attn_head_out_by_pos", attribution_patch),
    ):
        wanted = by(tiny, ids, act_patch_sites(tiny, ids, name), cache, metric)
        np.testing.assert_allclose(
            found["values"], (wanted.values.ravel() - base) / (clean - base), rtol=1e-5, atol=1e-8
        )
    edges = edge_attribution(tiny, CORRUPTED, cache, metric)
    order = np.argsort(-np.abs(edges.values), kind="stable")[:400]
    np.testing.assert_allclose(circuit["values"], edges.values[order], rtol=1e-9)
    assert [edge[2] for edge in circuit["edges"]] == [edges.labels["edge"][i] for i in order]


def test_an_adopted_file(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(gzip.decompress((COMMITTED / "small-llama.genai-int4.onnx.gz").read_bytes()))
    report = adopt(file, tmp_path / "adopted", announce=lambda _: None)
    assert report.folder is not None
    pair = ("--clean", "1 5 9 20 33 4", "--corrupted", "1 5 9 21 33 4", "--answer", "7", "--wrong", "9")
    done = graphlens("report", report.folder, *pair, "-o", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    attention, lens, *_ = views_of(tmp_path / "a.html")
    model = HookedTransformer.from_onnx(report.folder)
    logits, cache = model.run_with_cache(np.array([[1, 5, 9, 20, 33, 4]]))
    rows, columns = np.tril_indices(6)
    patterns = np.stack([cache["pattern", layer][0] for layer in range(model.cfg.n_layers)])
    np.testing.assert_array_equal(attention["data"]["patterns"], patterns[:, :, rows, columns].ravel())
    assert attention["data"]["tokens"] == ["1", "5", "9", "20", "33", "4"]
    shares = np.exp(logits[0].astype(np.float64)) / np.exp(logits[0].astype(np.float64)).sum(-1, keepdims=True)
    found = lens["data"]["figures"]["probability of the likeliest token"].reshape(-1, 6)[-1]
    # The unembedding of this file multiplies int4 weights by rounded activations; the lens uses the dequantised weights, and says
    # how far that is from the model's own output.
    off = re.search(
        r"own output, to within ([0-9.e-]+) in any probability", (tmp_path / "a.html").read_text(encoding="utf-8")
    )
    assert off
    assert 1e-3 < np.abs(found - shares.max(-1)).max() <= 1.5 * float(off[1]) < 0.01


def test_a_long_prompt_shows_its_end_and_says_so(tiny: HookedTransformer, tmp_path: Path) -> None:
    done = graphlens("report", "tiny-gpt2", "the cat sat and " * 25, "-o", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    attention, lens, text = views_of(tmp_path / "a.html")
    assert len(attention["data"]["tokens"]) == len(lens["data"]["tokens"]) == 64
    length = len(text["data"]["tokens"])
    assert length > 64
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert f"Attention (the last 64 of {length} positions)" in page
    assert f"over all {length} positions, 64 of which are shown" in page


def test_one_token_has_no_loss(tmp_path: Path) -> None:
    done = graphlens("report", "tiny-gpt2", "--ids", "7", "-o", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    assert [view["kind"] for view in views_of(tmp_path / "a.html")] == ["attention", "lens"]


def test_the_same_prompt_twice_has_nothing_to_restore(tmp_path: Path) -> None:
    pair = ("--clean", PROMPT, "--corrupted", PROMPT, "--answer", " Mary", "--wrong", " John")
    done = graphlens("report", "tiny-gpt2", *pair, "-o", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    assert "Note: Patching heads is not in the page: both prompts have the same logit difference" in " ".join(
        done.stderr.split()
    )
    assert "Patching heads: not shown." in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "give one prompt: as PROMPT, or as --clean with --corrupted"),
        (("a", "--clean", "a", "--corrupted", "b"), "give one prompt"),
        (("--clean", "a"), "--clean and --corrupted go together"),
        (("a", "--corrupted", "b"), "--clean and --corrupted go together"),
        (("--clean", "a", "--corrupted", "b"), "need --answer and --wrong"),
        (("a", "--wrong", " b"), "--wrong needs --answer"),
        (("a", "-o", "a.pdf"), "a page ends in .html"),
        (("a", "-o", "/nowhere/a.html"), "there is no folder /nowhere"),
        (("--clean", "the cat", "--corrupted", "a", "--answer", " a", "--wrong", " b"), "tokens and the corrupted one"),
        (("a", "--answer", " no such token at all"), "no such token at all"),
        (("--ids", "5 6", "--answer", "99999999"), "99999999"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    given: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = graphlens("report", "tiny-gpt2", *given)
    assert done.returncode == 1
    assert said in sentence(done.stderr)
    assert list(tmp_path.iterdir()) == []
