"""The features of an SAE on the live page in Chromium: what it shows, and what a clamped one does, is what Python computes.

    python -m pytest tests/live/features_in_chromium.py

It needs Chromium, Node and the npm packages of tests/js (npm ci --ignore-scripts), so no test run collects it by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import graphlens
from graphlens import HookedTransformer, Patch, Sae, Scale, Steer
from graphlens.interventions import Intervention, from_json
from graphlens.pipelines.page import write_page, write_page_file
from tests.command_line import graphlens as command
from tests.live.in_chromium import CLOSE, PROMPT, RUNTIME, choose, error, fill, settle, table
from tools.browser import Browser, Page
from tools.serving import serving

RELEASE = "tiny-gpt2-saes"
TRANSCODER = "blocks.1.hook_mlp_out"
ROWS = (
    "[...document.querySelectorAll('#found tbody tr')].map((r) => [Number(r.dataset.feature), Number(r.cells[1].textContent), "
    "Number(r.cells[2].textContent), r.cells[4].textContent])"
)


@pytest.fixture(scope="module")
def saes() -> list[Sae]:
    """The SAE of the residual stream, and a transcoder."""
    root = graphlens.embedded_model().parent / RELEASE
    (hook,) = (path.name for path in root.glob("blocks.*.hook_resid_post"))
    return [Sae.from_pretrained(RELEASE, hook), Sae.from_pretrained(RELEASE, TRANSCODER)]


@pytest.fixture(scope="module")
def model(saes: list[Sae]) -> HookedTransformer:
    found = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    for sae in saes:
        found.add_sae(sae, use_error_term=True)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(browser: Browser, saes: list[Sae], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    root = tmp_path_factory.mktemp("features")
    write_page(
        graphlens.embedded_model(), root / "site", prompt=PROMPT, saes=saes, runtime=RUNTIME, announce=lambda _: None
    )
    with serving(root / "site") as address:
        found = browser.open(address)
        ready = found.value("window.graphlens.ready")
        assert isinstance(ready, dict)
        assert ready["distrust"] is None
        yield found
    assert found.faults() == []


def acts(sae: Sae) -> str:
    return f"{sae.cfg.writes}.hook_sae_acts_post"


def clamp(page: Page, feature: int, kind: str, value: float, positions: str = "all") -> None:
    page.click(f'#found button[data-feature="{feature}"]')
    assert page.value("document.getElementById('feature').value") == str(feature)
    choose(page, "clamp-kind", kind)
    choose(page, "clamp-value", value)
    choose(page, "clamp-positions", positions)
    page.click("#clamp button")
    settle(page)
    assert error(page) == ""


def same_features(page: Page, model: HookedTransformer, sae: Sae, edits: list[Intervention], at: int) -> None:
    """The table of features beside Python's values at a token, and the edited logits beside Python's."""
    tokens = model.to_tokens(PROMPT)
    _, plain = model.run_with_cache(tokens)
    with model.intervene(edits):
        logits, edited = model.run_with_cache(tokens)
    values = [cache[acts(sae)][0, at] for cache in (plain, edited)]
    rows = page.value(ROWS)
    assert isinstance(rows, list)
    size = np.abs(values).max(axis=0)
    assert len(rows) == min(20, (size > 0).sum())
    for feature, intact, after, _ in rows:
        assert abs(intact - values[0][feature]) <= CLOSE
        assert abs(after - values[1][feature]) <= CLOSE
    shown = {int(row[0]) for row in rows}
    assert (
        max([size[i] for i in range(len(size)) if i not in shown], default=0) <= min(size[i] for i in shown) + 2 * CLOSE
    )
    for token, (before, _, logit_before, logit) in table(page).items():
        assert abs(logit - logits[0, at, token]) <= CLOSE
        assert 0 <= before <= 1
        assert abs(logit_before - model(tokens)[0, at, token]) <= CLOSE


def test_features_are_shown_clamped_copied_and_baked(
    page: Page, model: HookedTransformer, saes: list[Sae], tmp_path: Path
) -> None:
    resid, transcoder = saes
    page.value("document.getElementById('clear').click()")
    choose(page, "sae", 1)  # in the order in which they have values: the transcoder is the first
    settle(page)
    tokens = model.to_tokens(PROMPT)
    last = tokens.shape[1] - 1
    same_features(page, model, resid, [], last)
    # What a feature writes for: its decoder row through the final norm (without a mean it is the row's direction) and W_U.
    rows = page.value(ROWS)
    assert isinstance(rows, list)
    weights = {name: np.asarray(model.weights[name], np.float64) for name in ("ln_final.w", "unembed.W_U")}
    for feature, _, _, told in rows:
        row = resid.W_dec[feature].astype(np.float64)
        raised = (row - row.mean()) * weights["ln_final.w"] @ weights["unembed.W_U"]
        assert told.split(" ") == "".join(
            model.to_string([int(token)]) + "\0" for token in np.argsort(-raised)[:3]
        ).strip("\0").replace("\0", " ").split(" ")
    strongest = int(rows[0][0])
    edits: list[Intervention] = []
    for kind, value, edit in (
        ("scale", 2.5, Scale(acts(resid), 2.5, dims=strongest)),
        ("steer", -1.5, Steer(acts(resid), -1.5, dims=strongest)),
        ("patch", 9.0, Patch(acts(resid), 9.0, dims=int(rows[1][0]), positions=last)),
    ):
        clamp(page, int(rows[1][0]) if kind == "patch" else strongest, kind, value, "one" if kind == "patch" else "all")
        edits.append(edit)
        same_features(page, model, resid, edits, last)
    assert np.abs(model.run_with_interventions(tokens, edits) - model(tokens)).max() > 0.5
    # At another token, and at the other SAE, which comes before it.
    page.click("#tokens button:nth-child(5)")
    settle(page)
    same_features(page, model, resid, edits, 4)
    choose(page, "sae", 0)
    settle(page)
    same_features(page, model, transcoder, edits, 4)
    others = page.value(ROWS)
    assert isinstance(others, list)
    clamp(page, int(others[0][0]), "patch", 4.0, "one")
    edits.append(Patch(acts(transcoder), 4.0, dims=int(others[0][0]), positions=4))
    same_features(page, model, transcoder, edits, 4)
    text = str(page.value("document.getElementById('json').value"))
    assert from_json(text) == edits
    (tmp_path / "edits.json").write_text(text)
    named = [f"{RELEASE}/{sae.cfg.writes}" for sae in saes]
    done = command(
        "bake", "tiny-gpt2", tmp_path / "edits.json", "--sae", named[0], "--sae", named[1], "--error-term",
        "-o", tmp_path / "baked",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(tmp_path / "baked" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input_ids": tokens})
    for token, (_, _, _, logit) in table(page).items():
        assert abs(logits[0, 4, token] - logit) <= CLOSE


def test_a_feature_that_is_not_there_is_refused(page: Page, saes: list[Sae]) -> None:
    page.value("document.getElementById('clear').click()")
    choose(page, "sae", 1)
    settle(page)
    page.value("document.getElementById('clamp').noValidate = true")
    fill(page, "feature", str(saes[0].cfg.d_sae))
    page.click("#clamp button")
    settle(page)
    assert f"there is no {saes[0].cfg.d_sae}" in error(page)
    assert page.value("document.querySelectorAll('#edits li').length") == 0


def test_one_file_has_the_features_and_opens_with_one_clamped(
    browser: Browser, model: HookedTransformer, saes: list[Sae], tmp_path: Path
) -> None:
    edits: list[Intervention] = [Patch(acts(saes[0]), 12.0, dims=7)]
    file = write_page_file(
        graphlens.embedded_model(),
        tmp_path / "one.html",
        prompt=PROMPT,
        edits=edits,
        saes=saes[0],
        runtime=RUNTIME,
        announce=lambda _: None,
    )
    page = browser.open(file)
    page.value("window.graphlens.ready")
    settle(page)
    same_features(page, model, saes[0], edits, model.to_tokens(PROMPT).shape[1] - 1)
    assert page.value("document.getElementById('sae-label').hidden") is True
    assert f"feature 7 at {saes[0].cfg.writes} set to 12" in str(
        page.value("document.getElementById('edits').textContent")
    )
    page.close()
