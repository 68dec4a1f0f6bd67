"""Weight processing of every family: TransformerLens 3.9's processed model, and the predictions of the unprocessed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlens import HookedTransformer, process_weights
from graphlens.analysis.numerics import log_softmax
from graphlens.errors import ExportError
from graphlens.file.names import split_name
from graphlens.file.processing import STEPS
from tests.families.comparing import TOLERANCE, prompt, relative
from tests.families.variants import CHOSEN, PROCESSED, VARIANTS

Folders = Callable[[str], Path]
Models = Callable[[str], HookedTransformer]
USUAL = STEPS[:4]  # from_pretrained's defaults


@pytest.fixture(scope="module")
def processed(family_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A variant processed by from_pretrained's defaults, by its name."""
    made: dict[str, HookedTransformer] = {}

    def find(name: str) -> HookedTransformer:
        if name not in made:
            out = tmp_path_factory.mktemp("processed") / name
            process_weights(family_folder(name), out, announce=lambda _: None)
            made[name] = HookedTransformer.from_onnx(out, "cpu")
        return made[name]

    return find


@pytest.mark.parametrize("name", PROCESSED)
def test_the_predictions_stay(name: str, processed: Models, family_model: Models) -> None:
    tokens = prompt(101, 2, 11)
    found, expected = processed(name)(tokens), family_model(name)(tokens)
    assert relative(log_softmax(found), log_softmax(expected), name) <= TOLERANCE
    assert processed(name).cfg.processing


@pytest.mark.parametrize("name", [name for name in CHOSEN if VARIANTS[name].lens is not None])
def test_every_hook_point_and_weight_is_transformerlenss(
    name: str, processed: Models, family_checkpoint: Folders
) -> None:
    from tests.families.lens import lens_of

    ours, tokens = processed(name), prompt(101, 2, 11)
    # What from_pretrained leaves out for an architecture it leaves out before it processes.
    asked = {step: step in ours.cfg.processing or step == "center_writing_weights" for step in USUAL}
    if ours.cfg.post_norm_only:
        asked["center_writing_weights"] = False
    lens = lens_of(name, family_checkpoint(name), **asked)
    expected, lens_cache = lens.run_with_cache(torch.from_numpy(tokens))
    logits, cache = ours.run_with_cache(tokens)
    assert relative(logits, expected, "logits") <= TOLERANCE
    shared = [hook for hook in lens_cache if ".experts." not in hook]
    assert set(cache) == set(shared)
    for hook in shared:
        assert relative(cache[hook], lens_cache[hook], hook) <= TOLERANCE, hook
    weights = ours.state_dict()
    for key, value in lens.state_dict().items():
        if key in weights:
            assert relative(weights[key], value, key) <= TOLERANCE, key
    assert lens.cfg.normalization_type == ours.cfg.normalization_type


@pytest.mark.parametrize("step", USUAL)
@pytest.mark.parametrize("name", PROCESSED)
def test_each_step_alone_keeps_the_predictions(
    name: str, step: str, family_folder: Folders, family_model: Models, tmp_path: Path
) -> None:
    notes: list[str] = []
    chosen = {other: other == step for other in USUAL}
    out = process_weights(family_folder(name), tmp_path / "model", **chosen, announce=notes.append)
    model, tokens = HookedTransformer.from_onnx(out, "cpu"), prompt(101, 2, 11)
    found, expected = model(tokens), family_model(name)(tokens)
    assert relative(log_softmax(found), log_softmax(expected), name) <= TOLERANCE
    centring = model.cfg.normalization_type.startswith("LN")
    assert bool(model.cfg.processing) != bool(notes or (step == "center_writing_weights" and not centring))


def test_what_is_left_out_is_said(family_folder: Folders, tmp_path: Path) -> None:
    notes: list[str] = []
    process_weights(family_folder("olmo2"), tmp_path / "olmo2", announce=notes.append)
    process_weights(family_folder("gemma2"), tmp_path / "gemma2", announce=notes.append)
    assert [note.partition(" ")[0] for note in notes] == ["fold_ln", "center_writing_weights", "center_unembed"]
    with pytest.warns(UserWarning, match="center_unembed is left out: the logits are squeezed by tanh"):
        process_weights(family_folder("gemma2"), tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "why"), [("llama", "rotated"), ("qwen3", "rotated"), ("neox", "rotated"), ("gemma3", "rotated")]
)
def test_refactoring_is_refused_where_no_matrix_makes_the_scores(
    name: str, why: str, family_folder: Folders, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"refactor_factored_attn_matrices cannot be done for this model: .*{why}"):
        process_weights(family_folder(name), tmp_path / "model", refactor_factored_attn_matrices=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["neox", "gemma3"])
def test_norms_of_queries_and_keys_and_after_sublayers_stay(name: str, processed: Models, family_model: Models) -> None:
    ours, before = processed(name).weights, family_model(name).weights
    kept = [key for key in before if key.endswith(("_post.w", "_norm.w"))]
    assert bool(kept) == (name == "gemma3")
    for key in kept:
        np.testing.assert_array_equal(ours[key], before[key])
    gone = {split_name(key)[1] for key in before.keys() - ours.keys()}
    assert gone == {"ln1.w", "ln2.w", "ln_final.w"} | ({"ln1.b", "ln2.b", "ln_final.b"} if name == "neox" else set())


def test_biases_that_a_checkpoint_lacks_take_in_those_of_norms(tmp_path: Path) -> None:
    """GPT-NeoX without biases of attention: those of its LayerNorms become some, and those of values another."""
    import graphlens
    from tests.families.variants import make

    make("neox", attention_bias=False, num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint")
    graphlens.export_model(tmp_path / "checkpoint", tmp_path / "hooked", announce=lambda _: None)
    before, tokens = HookedTransformer.from_onnx(tmp_path / "hooked", "cpu"), prompt(101, 2, 11)
    process_weights(tmp_path / "hooked", tmp_path / "processed")
    ours = HookedTransformer.from_onnx(tmp_path / "processed", "cpu")
    assert relative(log_softmax(ours(tokens)), log_softmax(before(tokens)), "predictions") <= TOLERANCE
    new = {key.rpartition(".")[2] for key in ours.weights.keys() - before.weights.keys()}
    assert new == {"b_Q", "b_K", "b_V", "b_O", "b_U"}
    old: dict[str, Any] = {key.removeprefix("blocks.0."): value for key, value in before.weights.items()}
    expected = old["ln1.b"] @ old["attn.W_Q"]
    assert relative(ours.weights["blocks.0.attn.b_Q"], expected, "b_Q") <= 1e-6
    moved = np.einsum("hd,hdD->D", old["ln1.b"] @ old["attn.W_V"], old["attn.W_O"])
    assert relative(ours.weights["blocks.0.attn.b_O"], moved - moved.mean(), "b_O") <= 1e-6
    assert not ours.weights["blocks.0.attn.b_V"].any()


def test_from_pretrained_processes_by_default(
    family_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of a checkpoint and of a hooked file; what was left out is not asked for again."""
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    tokens = prompt(101, 1, 5)
    model = HookedTransformer.from_pretrained(family_folder("llama"))
    assert model.cfg.processing == ("fold_ln", "center_unembed", "fold_value_biases")
    assert model.cfg.normalization_type == "RMSPre"
    again = HookedTransformer.from_pretrained(model.runner.engine.folder)
    np.testing.assert_array_equal(again(tokens), model(tokens))


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_an_embedding_set_apart_from_its_unembedding_is_processed(
    name: str, family_model: Models, tmp_path: Path
) -> None:
    """The baked file's unembedding has the name that processing gives its own."""
    model = family_model(name)
    model.set_weights({"embed.W_E": model.weights["embed.W_E"] * np.float32(1.1)})
    baked = model.bake([], tmp_path / "baked", keep_hooks=True)
    folded = HookedTransformer.from_onnx(process_weights(baked, tmp_path / "out", announce=lambda _: None), "cpu")
    tokens = prompt(101, 2, 9)
    assert relative(log_softmax(folded(tokens)), log_softmax(model(tokens)), name) <= TOLERANCE
