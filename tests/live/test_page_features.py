"""A live page with SAEs, without a browser: its graph in plain ONNX Runtime is the model with the SAEs, and what it is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, HookedTransformer, Patch, Sae, Scale, Steer, surgery
from graphlens.edits.spliced_sae import SplicedSae
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.pipelines import page as pages
from graphlens.pipelines.feature_tokens import COUNT, feature_tokens
from graphlens.pipelines.page import write_page, write_page_file
from graphlens.surgery.held_weights import beside
from graphlens.surgery.page_graph import LENS_COUNT, PageGraph, page_graph
from tests.command_line import graphlens as command
from tests.command_line import sentence
from tests.live.page_models import PROGRAMS, run
from tests.live.test_page_files import settings_of

IDS = [0, 311, 7, 45, 12, 602, 9]
TINY, LLAMA = graphlens.embedded_model(), graphlens.embedded_model("tiny-llama")


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "runtime_files", lambda *_: PROGRAMS)


def random_sae(hook: str, features: int, seed: int = 0, hook_out: str | None = None) -> Sae:
    rng = np.random.default_rng(seed)
    enc, dec = (rng.standard_normal((128, features)) / 11 for _ in range(2))
    kind = {"architecture": "transcoder", "hook_out": hook_out} if hook_out else {"architecture": "topk", "k": 9}
    return Sae.from_arrays(enc, rng.standard_normal(features), dec.T, rng.standard_normal(128), hook, **kind)


def saes() -> list[Sae]:
    """One at the end of the model, one in its middle, and a transcoder."""
    return [
        random_sae("blocks.3.hook_resid_post", 77),
        random_sae("blocks.1.hook_resid_post", 61, 1),
        random_sae("blocks.2.ln2.hook_normalized", 43, 2, "blocks.2.hook_mlp_out"),
    ]


def acts(sae: Sae) -> str:
    return f"{sae.cfg.writes}.hook_sae_acts_post"


def grown(folder: Path, out: Path) -> tuple[PageGraph, Path]:
    """A page's graph with the SAEs, and a folder with all its weights."""
    hooked = surgery.with_saes(surgery.load(folder), [SplicedSae.of(sae, error_term=True) for sae in saes()])
    graph = page_graph(hooked)
    model, _ = beside(graph.model, out)
    (out / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return PageGraph(model, graph.gates, graph.patterns, graph.outputs, graph.lens, graph.no_lens, graph.features), out


@pytest.mark.parametrize("folder", [TINY, LLAMA], ids=lambda path: path.name)
def test_its_graph_computes_what_the_model_with_the_saes_does(folder: Path, tmp_path: Path) -> None:
    graph, weights = grown(folder, tmp_path)
    model, tokens = HookedTransformer.from_onnx(folder, "cpu"), np.array([IDS])
    plain = model(tokens)
    for sae in saes():
        model.add_sae(sae, use_error_term=True)
    manifest = surgery.read_manifest(graph.model)
    assert graph.features == tuple(acts(saes()[i]) for i in (1, 2, 0))  # in firing order
    assert graph.gates[-3:] == graph.features
    np.testing.assert_allclose(run(graph, weights, IDS)["logits"], plain, atol=1e-4, rtol=0)
    edits = {
        acts(saes()[0]): [Patch(acts(saes()[0]), 5.0, dims=17, positions=-1)],
        acts(saes()[1]): [Scale(acts(saes()[1]), 3.0, dims=[3, 60]), Ablate(acts(saes()[1]), positions=2)],
        acts(saes()[2]): [Steer(acts(saes()[2]), -2.0, dims=5)],
        "blocks.0.attn.hook_z": [Ablate("blocks.0.attn.hook_z", heads=1)],
    }
    found = run(graph, weights, IDS, edits, manifest)
    with model.intervene([item for items in edits.values() for item in items]):
        logits, cache = model.run_with_cache(tokens)
    assert np.abs(logits - plain).max() > 0.5
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4, rtol=0)
    for hook, output in graph.outputs.items():
        np.testing.assert_allclose(found[output], cache[hook], atol=1e-4, rtol=0)
    # The lens reads what goes on after an SAE, so that its last row is the model's own prediction.
    assert graph.lens is not None
    for row, hook in enumerate(graph.lens):
        goes_on = cache[f"{hook}.hook_sae_output"] if f"{hook}.hook_sae_output" in cache else cache[hook]
        ends = model.unembed(model.ln_final(goes_on))[0].astype(np.float64)
        odds = np.exp(ends - ends.max(-1, keepdims=True))
        largest = np.sort(odds / odds.sum(-1, keepdims=True), -1)[:, : -LENS_COUNT - 1 : -1]
        np.testing.assert_allclose(found["lens/probabilities"][row], largest, atol=1e-4, rtol=0)
    last = np.exp(logits[0] - logits[0].max(-1, keepdims=True))
    np.testing.assert_allclose(
        found["lens/probabilities"][-1, :, 0], (last / last.sum(-1, keepdims=True)).max(-1), atol=1e-4
    )


@pytest.mark.parametrize("folder", [TINY, LLAMA], ids=lambda path: path.name)
def test_the_tokens_of_a_feature_are_those_that_its_row_raises(folder: Path) -> None:
    model, given = HookedTransformer.from_onnx(folder, "cpu"), {sae.cfg.writes: sae for sae in saes()}
    found = feature_tokens(surgery.load(folder), folder, given)
    unembed, gain = (np.asarray(model.weights[name], np.float64) for name in ("unembed.W_U", "ln_final.w"))
    for hook, sae in given.items():
        rows = sae.W_dec.astype(np.float64)
        if model.cfg.normalization_type == "LN":
            rows = rows - rows.mean(-1, keepdims=True)
        raised = rows * gain @ unembed  # the norm divides a row by one number, which changes no order
        assert len(found[hook]) == sae.cfg.d_sae
        for row, tokens in zip(raised, found[hook], strict=True):
            spread = 1e-4 * np.abs(row).max()
            np.testing.assert_allclose(row[tokens], np.sort(row)[: -COUNT - 1 : -1], atol=spread)


def test_features_of_heads_have_no_tokens() -> None:
    rng = np.random.default_rng(0)
    enc, dec = rng.standard_normal((128, 9)), rng.standard_normal((9, 128))
    sae = Sae.from_arrays(enc, np.zeros(9), dec, np.zeros(128), "blocks.1.attn.hook_z", reshape_activations="hook_z")
    assert feature_tokens(surgery.load(TINY), TINY, {sae.cfg.writes: sae}) == {}


def test_a_folder_has_the_saes_weights_and_the_script_is_told_of_them(tmp_path: Path) -> None:
    out = write_page(TINY, tmp_path / "site", saes=saes(), announce=lambda _: None)
    settings = settings_of((out / "index.html").read_text())
    weights, sizes, told = settings["weights"], settings["sizes"], settings["features"]
    assert isinstance(weights, list)
    assert isinstance(sizes, dict)
    assert isinstance(told, list)
    assert {f"model/{name}" for name in weights} <= sizes.keys()
    assert len(weights) == 4
    assert all((out / name).stat().st_size == size for name, size in sizes.items())
    assert [each["at"] for each in told] == [saes()[i].cfg.writes for i in (1, 2, 0)]
    hooks = settings["hooks"]
    assert isinstance(hooks, dict)
    assert [hooks[each["hook"]]["sizes"] for each in told] == [[1, 0, 61], [1, 0, 43], [1, 0, 77]]
    file = write_page_file(TINY, tmp_path / "one.html", saes=saes()[0], announce=lambda _: None)
    alone = settings_of(file.read_text())
    assert isinstance(alone["weights"], list)
    assert [f'data-file="model/{name}"' in file.read_text() for name in alone["weights"]] == [True, True]


def test_a_baked_file_with_an_sae_inside_has_its_features(tmp_path: Path) -> None:
    sae = saes()[1]
    edit = Scale(acts(sae), 2.0, dims=4)
    graphlens.bake_model(TINY, edit, tmp_path / "baked", keep_hooks=True, saes=sae, announce=lambda _: None)
    out = write_page(tmp_path / "baked", tmp_path / "site", announce=lambda _: None)
    told = settings_of((out / "index.html").read_text())["features"]
    assert told == [{"hook": acts(sae), "at": sae.cfg.writes, "tokens": None}]


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    wide = Sae.from_arrays(np.eye(64), np.zeros(64), np.eye(64), np.zeros(64), "blocks.1.hook_resid_post")
    with pytest.raises(InputError, match="d_in 64"):
        write_page(TINY, tmp_path / "site", saes=wide)
    with pytest.raises(UnknownHookPoint, match=r"blocks\.9\.hook_resid_post"):
        write_page(TINY, tmp_path / "site", saes=random_sae("blocks.9.hook_resid_post", 15))
    with pytest.raises(InputError, match="two SAEs would stand for"):
        write_page(TINY, tmp_path / "site", saes=[saes()[0], random_sae("blocks.3.hook_resid_post", 15)])
    with pytest.raises(InputError, match="77"):
        write_page(TINY, tmp_path / "site", saes=saes(), edits=Ablate(acts(saes()[0]), dims=77))
    with pytest.raises(InputError, match="a page has no gate there"):
        write_page(TINY, tmp_path / "site", saes=saes(), edits=Ablate("blocks.1.hook_resid_post.hook_sae_error"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", ["nowhere", "./nowhere/x/y", "tiny-gpt2-saes", "owner/name"])
def test_the_command_line_says_what_an_sae_may_be(named: str, tmp_path: Path) -> None:
    done = command("page", "tiny-gpt2", "-o", tmp_path / "site", "--sae", named)
    assert done.returncode == 1
    assert "there is no such folder" in sentence(done.stderr)


def test_the_command_line_lists_the_saes_that_ship(tmp_path: Path) -> None:
    done = command("page", "tiny-gpt2", "-o", tmp_path / "site", "--sae", "tiny-gpt2-saes/blocks.7.hook_mlp_out")
    assert done.returncode != 0
    assert "'blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out'" in sentence(done.stderr)
