"""HookedEncoder beside TransformerLens 3.9's and beside transformers: logits, hook points, weights, gradients, edits."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import graphlens
import graphlens.torch
from graphlens import Ablate, HookedEncoder, InputError, Patch, Steer, attribution, metrics, patching, surgery
from graphlens.export.checkpoint import supported_family
from graphlens.export.families import families
from tests.command_line import graphlens as command
from tests.families.comparing import SHAPES, TOLERANCE, prompt, read, relative
from tests.families.encoders import (
    ENCODERS,
    TYPES,
    against_lens,
    against_torch_hooks,
    against_transformers,
    checkpoint_of,
    config_of,
    edited,
    hooked_of,
    inputs,
    lens_of,
    reference_of,
    tensors,
    transformers_logits,
    word_pieces,
)

Folders = Callable[[str], Path]
EFFECT = metrics.LogitDiff(3, 5, position=4)


@pytest.fixture(scope="session")
def encoder_folder(families_root: Path) -> Folders:
    return lambda name: hooked_of(name, families_root)


@pytest.fixture(scope="session")
def encoder(encoder_folder: Folders) -> Callable[[str], HookedEncoder]:
    return lambda name: HookedEncoder.from_onnx(encoder_folder(name), "cpu")


@pytest.fixture(scope="session")
def reference(families_root: Path) -> Callable[[str], Any]:
    return lambda name: reference_of(name, families_root)


# Beside transformers


@pytest.mark.parametrize("name", ENCODERS)
def test_the_logits_are_transformers(name: str, encoder: Any, reference: Any) -> None:
    found = list(against_transformers(name, encoder(name), reference(name)))
    assert len(found) == len(SHAPES) + 4
    assert all(difference.share <= TOLERANCE for difference in found), found


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_activations_are_transformers(name: str, side: str, encoder: Any, reference: Any) -> None:
    """RoBERTa counts positions without PAD, inside a text too."""
    found = list(against_torch_hooks(name, encoder(name), reference(name), side))
    assert len(found) == 2 + 2 * 3
    assert all(difference.share <= TOLERANCE for difference in found), found


def test_fewer_layers_are_a_model_with_fewer_layers(encoder_folder: Folders, reference: Any, tmp_path: Path) -> None:
    short = surgery.first_layers(surgery.load(encoder_folder("bert")), 2)
    surgery.save(short, tmp_path / "short")
    model = reference("bert")
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    tokens, options = inputs()
    expected = transformers_logits(model, tokens, options)
    assert relative(HookedEncoder.from_onnx(tmp_path / "short")(tokens, **options), expected, "logits") <= TOLERANCE


@pytest.mark.parametrize(("dtype", "allowed"), [("float64", 1e-6), ("float16", 1e-2), ("bfloat16", 2e-2)])
def test_other_precisions(dtype: str, allowed: float, encoder_folder: Folders, reference: Any) -> None:
    model, (tokens, options) = HookedEncoder.from_pretrained(encoder_folder("bert"), dtype=dtype), inputs()
    expected = transformers_logits(reference("bert").double(), tokens, options)
    assert relative(model(tokens, **options).astype(np.float64), expected, dtype) <= allowed


# Beside TransformerLens


@pytest.mark.parametrize("name", ENCODERS)
def test_every_hook_point_is_transformerlenss(name: str, encoder: Any, reference: Any) -> None:
    ours = encoder(name)
    found = list(against_lens(ours, lens_of(reference(name))))
    assert len(found) == 1 + 2 * len(ours.hook_points())
    assert all(difference.share <= TOLERANCE for difference in found), found


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_result", "use_hook_mlp_in"])
def test_flagged_hook_points_are_transformerlenss(flag: str, encoder: Any, reference: Any) -> None:
    ours, lens = encoder("bert"), lens_of(reference("bert"))
    tokens, options = inputs()
    plain = set(ours.hook_points())
    getattr(ours, f"set_{flag}")(True)
    for block in lens.blocks:
        for part in (block, block.attn):
            setattr(part.cfg, flag, True)
    _, cache = ours.run_with_cache(tokens, **options)
    _, lens_cache = lens.run_with_cache(torch.from_numpy(tokens), **tensors(options))
    assert set(cache) == set(lens_cache)
    found = list(read(cache, {hook: value.numpy() for hook, value in lens_cache.items()}))
    assert all(difference.share <= TOLERANCE for difference in found), found
    new = sorted(set(cache) - plain)
    assert new
    for hook in new:
        assert edited(ours, lens, hook, tokens, options) <= TOLERANCE, hook


@pytest.mark.parametrize("name", ENCODERS)
def test_weights_are_transformerlenss(name: str, encoder: Any, reference: Any) -> None:
    ours, lens = encoder(name), lens_of(reference(name))
    expected = {
        key: value
        for key, value in lens.state_dict().items()
        if not key.startswith(("pooler.", "nsp_head.")) and "IGNORE" not in key
    }
    assert set(ours.state_dict()) == {key for key in expected if not key.endswith(".mask")}
    for key, value in ours.state_dict().items():
        assert np.array_equal(value, expected[key]), key
    for key in (
        "W_E",
        "W_pos",
        "W_E_pos",
        "W_U",
        "b_U",
        "W_Q",
        "W_K",
        "W_V",
        "W_O",
        "b_Q",
        "b_O",
        "W_in",
        "W_out",
        "b_in",
        "b_out",
    ):
        assert np.array_equal(getattr(ours, key), getattr(lens, key)), key
    assert np.array_equal(ours.mlm_head.W, lens.mlm_head.W)
    assert np.array_equal(ours.mlm_head.ln.w, lens.mlm_head.ln.w)
    assert np.array_equal(ours.embed.token_type_embed.W_token_type, lens.embed.token_type_embed.W_token_type)
    assert ours.all_head_labels() == lens.all_head_labels()


def test_an_encoder_says_what_it_is(encoder: Any) -> None:
    cfg = encoder("roberta").cfg
    assert (cfg.attention_dir, cfg.n_token_types, cfg.n_ctx, cfg.normalization_type) == (
        "bidirectional",
        TYPES,
        64,
        "LN",
    )
    assert "HookedEncoder" in repr(encoder("bert"))


# Gradients


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_are_autograds(name: str, encoder: Any, reference: Any) -> None:
    ours, lens = encoder(name), lens_of(reference(name))
    tokens, options = inputs()
    options["one_zero_attention_mask"][:, 4] = 1  # the metric's position
    found = ours.gradients(tokens, EFFECT, **options)
    kept: dict[str, torch.Tensor] = {}

    def keep(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        kept[hook.name] = activation if activation.requires_grad else activation.clone().requires_grad_()
        kept[hook.name].retain_grad()
        return kept[hook.name]

    logits = lens.run_with_hooks(torch.from_numpy(tokens), fwd_hooks=[(lambda _: True, keep)], **tensors(options))
    (logits[:, 4, 3] - logits[:, 4, 5]).mean().backward()
    assert set(found) == set(kept)
    for hook, gradient in found.items():
        expected = torch.nan_to_num(kept[hook].grad).numpy()  # of masked scores
        scale = max(float(np.abs(expected).max()), 1e-3)
        assert np.abs(gradient - expected).max() <= 1e-4 * scale, hook


def test_backward_hooks_are_called_by_backward(encoder_folder: Folders, encoder: Any) -> None:
    tokens, options = inputs()
    options["one_zero_attention_mask"][:, 4] = 1
    model, seen = graphlens.torch.HookedEncoder.from_onnx(encoder_folder("bert"), "cpu"), {}
    name = "blocks.1.hook_resid_pre"
    assert model.to("cpu").eval().cpu() is model
    with model.hooks(bwd_hooks=[(name, lambda gradient, hook: seen.update({hook.name: gradient}))]):
        logits = model(torch.from_numpy(tokens), **tensors(options))
        (logits[:, 4, 3] - logits[:, 4, 5]).mean().backward()
    expected = encoder("bert").gradients(tokens, EFFECT, names=name, **options)[name]
    assert np.allclose(seen[name], expected, atol=1e-6)


# Edits as data, in a run and in a file


def edits() -> list[Any]:
    rng = np.random.default_rng(3)

    def vector(size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    return [
        Steer("hook_full_embed", vector(40)),
        Ablate("blocks.0.attn.hook_z", heads=[1, 3]),
        Steer("blocks.0.hook_attn_out", vector(40)),
        Steer("blocks.0.hook_resid_mid", vector(40)),
        Steer("blocks.1.hook_resid_pre", vector(40)),
        Patch("blocks.1.mlp.hook_post", 0.5, dims=[2, 7]),
        Steer("blocks.1.hook_mlp_out", vector(40)),
        Steer("blocks.1.hook_resid_post", vector(40)),
        Steer("blocks.2.hook_normalized_resid_post", vector(40)),
    ]


def test_commands_take_an_encoders_checkpoint(families_root: Path, encoder: Any, tmp_path: Path) -> None:
    """Exported as HookedEncoder exports it, its tokenizer's special tokens around the text."""
    out, text = tmp_path / "acts.safetensors", "the cat [MASK] on the mat ."
    done = command("cache", checkpoint_of("bert", families_root), text, "-o", out)
    assert done.returncode == 0, done.stderr
    found, model = load_file(out), encoder("bert")
    _, cache = model.run_with_cache(text)
    assert found.keys() == {"tokens", *cache}
    np.testing.assert_array_equal(found["tokens"], model.to_tokens(text)[0])
    for name in cache:
        np.testing.assert_allclose(found[name], cache[name], atol=1e-6)
    told = json.loads(command("run", checkpoint_of("bert", families_root), text, "--top", "1", "--json").stdout)
    assert told["masked"][0]["likely"][0]["token"] == model(text, return_type="predictions")
    points = json.loads(command("hooks", checkpoint_of("bert", families_root), "--json").stdout)
    assert points.keys() == model.hook_points().keys()


@pytest.mark.parametrize("keep_hooks", [False, True])
def test_a_baked_file_computes_what_the_edited_run_does(keep_hooks: bool, encoder: Any, tmp_path: Path) -> None:
    model, (tokens, options) = encoder("bert"), inputs("left")
    for i, some in enumerate([edits(), *([edit] for edit in edits()[3::2])] if not keep_hooks else [edits()]):
        expected = model.run_with_interventions(tokens, some, **options)
        assert relative(expected, model(tokens, **options), "plain") > 1e-3  # it is an edit
        folder = model.bake(some, tmp_path / str(i), keep_hooks=keep_hooks)
        if keep_hooks:
            found = HookedEncoder.from_onnx(folder)(tokens, **options)
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(folder / "model.onnx")
            feeds = {"input_ids": tokens, "attention_mask": options["one_zero_attention_mask"]}
            (found,) = session.run(["logits"], {**feeds, "token_type_ids": options["token_type_ids"]})
        assert relative(found, expected, str(some)) <= TOLERANCE


def test_a_python_hook_is_an_intervention(encoder: Any) -> None:
    model, (tokens, options) = encoder("roberta"), inputs()

    def ablate(z: np.ndarray, hook: Any) -> None:
        z[:, :, 2] = 0

    name = "blocks.1.attn.hook_z"
    hooked = model.run_with_hooks(tokens, fwd_hooks=[(name, ablate)], **options)
    logits, cache = model.run_with_interventions(tokens, Ablate(name, heads=2), names_filter=name, **options)
    assert np.array_equal(hooked, logits)
    assert not cache[name][:, :, 2].any()


def test_a_sweep_is_one_forward_for_each_patch(encoder: Any) -> None:
    model = encoder("bert")
    clean, corrupted = prompt(101, 2, 5), prompt(101, 2, 7)[:, :5]
    types = np.random.default_rng(2).integers(0, TYPES, clean.shape)
    _, cache = model.run_with_cache(clean, token_type_ids=types)
    sites = patching.act_patch_sites(model, corrupted, "resid_pre")
    result = patching.sweep(model, corrupted, sites, cache, EFFECT, token_type_ids=types)
    assert "attend to later ones" in result.metadata["general_path"]
    for layer in range(3):
        for position in range(5):
            name = f"blocks.{layer}.hook_resid_pre"
            patch = Patch(name, cache[name][:, position], positions=position)
            logits = model.run_with_interventions(corrupted, patch, token_type_ids=types)
            assert abs(result.values[layer, position] - EFFECT(logits)) <= 1e-5


def test_set_weights_sets_the_embedding_apart(encoder: Any, reference: Any) -> None:
    model, theirs, (tokens, options) = encoder("bert"), reference("bert"), inputs()
    model.set_weights({"embed.embed.W_E": np.asarray(model.W_E) * 1.5})
    head = theirs.cls.predictions.decoder
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    theirs.bert.embeddings.word_embeddings.weight.data *= 1.5
    expected = transformers_logits(theirs, tokens, options)
    assert relative(model(tokens, **options), expected, "logits") <= TOLERANCE


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_two_segments_are_the_model(layer: int, encoder_folder: Folders, encoder: Any, tmp_path: Path) -> None:
    import onnxruntime

    whole, (tokens, options) = surgery.load(encoder_folder("bert")), inputs()
    feeds = {"input_ids": tokens, "attention_mask": options["one_zero_attention_mask"]}
    feeds["token_type_ids"] = options["token_type_ids"]
    for place, part in (("first", surgery.segment(whole, stop=layer)), ("then", surgery.segment(whole, start=layer))):
        surgery.save(part, tmp_path / place)
        session = onnxruntime.InferenceSession(tmp_path / place / "model.onnx")
        taken = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
        (output,) = session.run(None, {name: value for name, value in feeds.items() if name in taken})[:1]
        feeds["residual"] = output
    assert relative(output, encoder("bert")(tokens, **options), "logits") <= TOLERANCE


# Text


def test_text_goes_between_special_tokens_and_its_padding_is_masked(encoder: Any, reference: Any) -> None:
    model, theirs = encoder("bert"), reference("bert")
    texts = ["the cat sat on the [MASK] .", "birds flew"]
    given = word_pieces()(texts, return_tensors="np", padding=True)
    tokens, types, mask = model.to_tokens(texts)
    for ours, name in ((tokens, "input_ids"), (types, "token_type_ids"), (mask, "attention_mask")):
        assert np.array_equal(ours, given.get(name, np.zeros_like(tokens))), name
    expected = transformers_logits(theirs, tokens, {"one_zero_attention_mask": mask})
    assert relative(model(texts), expected, "logits") <= TOLERANCE
    assert relative(model(tokens, one_zero_attention_mask=mask), expected, "logits") <= TOLERANCE
    assert model.to_str_tokens(texts[1]) == ["[CLS]", "bird", "##s", "flew", "[SEP]"]
    _, cache = model.run_with_cache(texts)
    assert np.array_equal(cache.mask, mask)


def test_predictions_are_the_likeliest_words(encoder: Any, reference: Any) -> None:
    model, lens = encoder("bert"), lens_of(reference("bert"))
    lens.tokenizer = word_pieces()
    # All 101 tokens would need words.
    model.set_weights({"unembed.b_U": np.where(np.arange(101) < 23, model.b_U, -1e4).astype(np.float32)})
    lens.unembed.b_U.data[23:] = -1e4
    for text in ("the [MASK] sat", ["the [MASK] sat on the [MASK] .", "a dog ran"]):
        assert model(text, return_type="predictions") == lens(text, return_type="predictions")
    assert model("the cat", return_type=None) is None
    with pytest.raises(InputError, match=r"there is none: put '\[MASK\]'"):
        model("the cat", return_type="predictions")


def test_the_example_of_the_page_runs(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "encoders.md"
    (block,) = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.setattr(HookedEncoder, "from_pretrained", lambda name: encoder("bert"))
    found: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), found)
    assert found["tokens"][0, found["place"]] == word_pieces().mask_token_id
    assert found["gradients"]["blocks.1.attn.hook_z"].shape == (1, found["tokens"].shape[1], 5, 8)


def test_text_is_cut_before_its_last_special_token(encoder_folder: Folders) -> None:
    model = HookedEncoder.from_onnx(encoder_folder("bert"), "cpu", n_ctx=6)
    expected = word_pieces()("the cat sat on the mat", truncation=True, max_length=6)["input_ids"]
    assert model.to_tokens("the cat sat on the mat")[0].tolist() == [expected]
    assert model.to_tokens("the cat sat on the mat", truncate=False)[0].shape == (1, 8)
    assert model.W_pos.shape == (6, 40)
    with pytest.warns(UserWarning, match="cut from the end"):
        assert model("the cat sat on the mat").shape[1] == 6


# The same object as ever


def test_copies_and_caches(encoder: Any) -> None:
    model, (tokens, options) = encoder("bert"), inputs()
    expected, cache = model.run_with_cache(tokens, **options)
    for other in (pickle.loads(pickle.dumps(model)), copy.copy(model), copy.deepcopy(model)):
        assert np.array_equal(other(tokens, **options), expected)
    last = "blocks.2.hook_normalized_resid_post"
    assert np.array_equal(model.encoder_output(tokens, **options), cache[last])
    stacked, labels = cache.stack_head_results(return_labels=True)
    assert labels == model.all_head_labels()
    written = stacked.reshape(3, 5, *stacked.shape[1:]).sum(1) + model.b_O[:, None, None]
    for layer in range(3):
        assert relative(written[layer], cache["attn_out", layer], "attn_out") <= TOLERANCE
    neurons = cache.get_neuron_results(1).sum(-2) + model.b_out[1]
    assert relative(neurons, cache["mlp_out", 1], "mlp_out") <= TOLERANCE
    assert cache.stack_activation("resid_pre").shape == (3, *tokens.shape, 40)
    with pytest.warns(UserWarning, match="the cache holds the activations of the first one"):
        _, first = model.run_with_cache(tokens, remove_batch_dim=True, **options)
    assert type(first) is type(cache)
    np.testing.assert_array_equal(first["resid_pre", 1], cache["resid_pre", 1][0])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, t, c: m.generate(t), "an encoder does not generate"),
        (lambda m, t, c: m.test_prompt("the", "cat"), "test_prompt is for decoders"),
        (lambda m, t, c: m(t, "loss"), "return_type must be one of"),
        (lambda m, t, c: m(t, token_type_ids=np.full(t.shape, 3)), "from 0 to 2"),
        (lambda m, t, c: m(t, token_type_ids=[[0]]), r"token_type_ids has shape \[1, 1\]"),
        (lambda m, t, c: m(t, one_zero_attention_mask=t), "1 at real tokens and 0 at padding"),
        (lambda m, t, c: m(t, one_zero_attention_mask=t > 0, attention_mask=t > 0), "are one argument"),
        (lambda m, t, c: m.run_with_cache(t, incl_bwd=True), "an encoder has none: take model.gradients"),
        (lambda m, t, c: m.run_with_hooks(t, bwd_hooks=[("hook_full_embed", print)]), "would never fire"),
        (lambda m, t, c: m.accumulated_bias(1), "accumulated_bias is for decoders"),
        (lambda m, t, c: m.embed(t), "hook_full_embed"),
        (lambda m, t, c: c.decompose_resid(), "decompose_resid is for decoders"),
        (lambda m, t, c: c.accumulated_resid(), "accumulated_resid is for decoders"),
        (lambda m, t, c: c.logit_attrs(c["resid_pre", 1], 3), "logit_attrs is for decoders"),
        (lambda m, t, c: c.logit_lens(), "logit_lens is for decoders"),
        (lambda m, t, c: c.stack_head_results(apply_ln=True), "stack_head_results with apply_ln"),
        (lambda m, t, c: c.stack_neuron_results(1, None, None, False, True), "with incl_remainder"),
        (lambda m, t, c: patching.path_patch(m, t, c, EFFECT), "after each sublayer"),
        (
            lambda m, t, c: attribution.edge_attribution(m, t, c, EFFECT),
            "normalises its residual stream after each sublayer, so the stream is not the sum",
        ),
        (lambda m, t, c: attribution.direct_logit_attribution(m, t, EFFECT), "is for decoders"),
        (lambda m, t, c: m.bake([], "never", with_past=True), "no past keys and values"),
        (lambda m, t, c: m.to_tokens(t), "takes a text"),
    ],
)
def test_what_an_encoder_cannot_be_asked_is_said(call: Callable[..., Any], said: str, encoder: Any) -> None:
    model, tokens = encoder("bert"), prompt(101, 2, 6)
    _, cache = model.run_with_cache(tokens)
    with pytest.raises(InputError, match=said):
        call(model, tokens, cache)


def test_arguments_of_decoders_are_said(encoder: Any) -> None:
    with pytest.raises(TypeError, match="'start_at_layer'"):
        encoder("bert")(prompt(101, 2, 6), start_at_layer=1)
    with pytest.raises(TypeError, match=r"gradients\(\) does not take 'stop_at_layer' here"):
        encoder("bert").gradients(prompt(101, 2, 6), EFFECT, stop_at_layer=1)
    with pytest.raises(AttributeError, match=r"mlm_head\.ln"):
        _ = encoder("bert").ln_final


def test_each_kind_opens_its_own(encoder_folder: Folders, family_folder: Folders, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is an encoder \(BertForMaskedLM\): open it with graphlens.HookedEncoder"):
        graphlens.HookedTransformer.from_onnx(encoder_folder("bert"))
    with pytest.raises(InputError, match=r"is a decoder \(GPT2LMHeadModel\): open it with graphlens.HookedTransformer"):
        HookedEncoder.from_onnx(family_folder("gpt2"))
    with pytest.raises(graphlens.ExportError, match="its weights are not processed, as in TransformerLens"):
        graphlens.process_weights(encoder_folder("bert"), tmp_path / "out")
    with pytest.raises(InputError, match="the weights of encoders are not processed"):
        HookedEncoder.from_pretrained(encoder_folder("bert"), fold_ln=True)
    assert HookedEncoder.from_pretrained(encoder_folder("bert")).cfg.n_layers == 3


# Checkpoints


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
    ],
)
def test_configs_that_compute_otherwise_are_refused(changes: dict[str, Any], said: str) -> None:
    for name, family in ((name, family) for name in ENCODERS for family in families()):
        if family.model_types == (name,):
            with pytest.raises(graphlens.ExportError, match=said):
                family.spec_of(config_of(name, **changes), "this")


def test_other_heads_of_bert_are_refused_by_name() -> None:
    for architecture in ("BertModel", "BertForNextSentencePrediction", "BertForSequenceClassification"):
        with pytest.raises(graphlens.ExportError, match=f"{architecture}.*BertForMaskedLM"):
            supported_family({"architectures": [architecture], "model_type": "bert"}, "this")


def test_old_names_of_norms_are_known() -> None:
    family = next(family for family in families() if family.architecture == "BertForMaskedLM")
    name = "bert.encoder.layer.0.output.LayerNorm"
    assert family.keys(f"{name}.weight", tied=True) == [f"{name}.weight", f"{name}.gamma"]
    assert family.keys(f"{name}.bias", tied=True) == [f"{name}.bias", f"{name}.beta"]
