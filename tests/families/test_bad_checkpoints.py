"""Checkpoints that cannot be exported, or not as they seem: what is said, when, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import graphlens
from graphlens import HookedTransformer, surgery
from graphlens.errors import ExportError, InputError, ModelFileError
from graphlens.export import ConfigReader, Spec
from graphlens.export.checkpoint import read_checkpoint
from graphlens.export.trace import trace
from graphlens.file.manifest import Manifest
from graphlens.metrics import LogitDiff
from graphlens.patching import Site, sweep
from graphlens.pipelines.hub import resolve
from graphlens.surgery.graph import write_manifest
from tests.families.comparing import prompt, reference_logits

Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@pytest.fixture
def changed(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a variant's checkpoint with other tensors, or other keys in its config."""

    def copy(name: str, tensors: Change = lambda found: found, **config: Any) -> Path:
        folder = tmp_path / f"{name}-changed"
        shutil.copytree(family_checkpoint(name), folder, dirs_exist_ok=True)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | config))
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


def with_tensors(*keys: str, shape: Sequence[int] = (48,)) -> Change:
    return lambda found: {**found, **{key: np.ones(shape, np.float32) for key in keys}}


def test_a_tensor_that_is_missing_or_one_too_many_is_refused_and_nothing_is_left(
    changed: Callable[..., Path], tmp_path: Path
) -> None:
    lost = changed("llama", lambda found: {key: x for key, x in found.items() if "layers.1.mlp.up_proj" not in key})
    with pytest.raises(ExportError, match=r"no tensor for 'model\.layers\.1\.mlp\.up_proj\.weight'.*LlamaForCausalLM"):
        graphlens.export_model(lost, tmp_path / "out", verify=False)
    more = changed("llama", with_tensors("model.layers.0.self_attn.q_proj.bias"))
    with pytest.raises(ExportError, match=r"hold 'model\.layers\.0\.self_attn\.q_proj\.bias', for which the Llama"):
        graphlens.export_model(more, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "key", "refused"),
    [
        ("llama", "model.layers.0.self_attn.k_proj.bias", True),
        ("llama", "model.layers.3.input_layernorm.weight", True),  # one layer more than the config has
        ("llama", "layers.2.self_attn.q_norm.weight", True),
        ("llama", "model.norm.bias", True),
        ("llama", "lm_head.bias", True),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("llama", "score.weight", None),
        ("llama-tied-biases", "lm_head.weight", False),
        ("gpt2", "transformer.h.0.attn.bias", False),
        ("gpt2", "h.1.attn.masked_bias", False),
        ("gpt2", "h.1.mlp.c_gate.weight", True),
        ("neox", "gpt_neox.layers.0.attention.bias", False),
        ("neox", "gpt_neox.layers.0.attention.masked_bias", False),
        ("neox", "embed_out.bias", True),
    ],
)
def test_tensors_without_a_use(
    name: str, key: str, refused: bool | None, changed: Callable[..., Path], family_reference: Any
) -> None:
    """Refused where the model should have a use for them, named where not, and nothing is said of computed buffers."""
    checkpoint = read_checkpoint(changed(name, with_tensors(key)))
    shapes = {key: tuple(parameter.shape) for key, parameter in family_reference(name).named_parameters()}
    blocks = {"gpt2": "transformer.h", "neox": "gpt_neox.layers"}.get(name, "model.layers")
    tied = bool(checkpoint.hf_config().tie_word_embeddings)
    if refused:
        with pytest.raises(ExportError, match=rf"the weights hold '{key}', for which the .* has no use"):
            checkpoint.ensure_complete(shapes, blocks, tied)
    else:
        assert checkpoint.ensure_complete(shapes, blocks, tied) == ([key] if refused is None else [])


def test_shapes_that_contradict_the_config_are_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed("llama", num_key_value_heads=3)
    with pytest.raises(
        ExportError, match=r"k_proj\.weight' has shape \[16, 48\] where config\.json asks for \[24, 48\]"
    ):
        graphlens.export_model(folder, tmp_path / "out")


@pytest.mark.parametrize("key", ["qweight", "qzeros", "g_idx", "weight.absmax", "SCB", "weight_packed"])
def test_quantised_tensors_are_said_to_be_that(key: str, changed: Callable[..., Path]) -> None:
    def quantised(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**found, f"model.layers.0.self_attn.q_proj.{key}": np.ones((6, 48), np.int32)}

    with pytest.raises(ExportError, match=rf"q_proj\.{key}' \(GPTQ, AWQ or bitsandbytes\): its weights are quantised"):
        read_checkpoint(changed("llama", quantised))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_quantised_config_is_said_to_be_that(method: str, changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed("llama", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ExportError, match=rf"quantization_config \({method}\): its weights are quantised.*dequantised"):
        graphlens.export_model(folder, tmp_path / "out")


def test_gguf_weights_are_said_to_be_that(changed: Callable[..., Path]) -> None:
    folder = changed("llama")
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")
    with pytest.raises(ExportError, match=r"holds GGUF weights, which graphlens does not read"):
        read_checkpoint(folder)


def test_an_unknown_flag_is_refused_before_any_weight_is_fetched(
    changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, asked = changed("llama", attn_output_gate=True), list[str]()

    def download(repo: str, allow_patterns: Sequence[str], **options: object) -> str:
        assert list(allow_patterns) == ["config.json"], "a weight was asked for"
        asked.append(repo)
        (tmp_path / "hub").mkdir(exist_ok=True)
        shutil.copyfile(folder / "config.json", tmp_path / "hub" / "config.json")
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", lambda *_, **__: [])
    with pytest.raises(
        ExportError, match=r"^someone/model: config\.json sets attn_output_gate=True, and graphlens does"
    ):
        resolve("someone/model", cache_dir=tmp_path)
    assert asked == ["someone/model"]


def test_the_most_tokens_are_set_at_the_export_and_again_when_it_is_opened(
    changed: Callable[..., Path], family_reference: Any, tmp_path: Path
) -> None:
    checkpoint = changed("llama", with_tensors("value_head.weight", "value_head.bias"))
    with pytest.warns(
        UserWarning, match=r"tensors that the model does not use: value_head\.bias, value_head\.weight\."
    ):
        folder = graphlens.export_model(checkpoint, tmp_path / "out", n_ctx=9, verify=False).folder
    model, tokens = HookedTransformer.from_onnx(folder, "cpu"), prompt(101, 1, 40)
    assert (model.cfg.n_ctx, model.cfg.n_ctx_trained) == (9, 64)
    with pytest.raises(InputError, match=r"40 tokens, and .* takes at most 9"):
        model(tokens)
    longer = HookedTransformer.from_onnx(folder, "cpu", n_ctx=64)
    assert (
        longer.cfg.n_ctx,
        len(longer.generate(tokens, 24, stop_at_eos=False, do_sample=False, verbose=False)[0]),
    ) == (64, 64)
    expected = reference_logits(family_reference("llama"), tokens)
    assert np.abs(longer(tokens) - expected).max() <= 5e-5 * max(1.0, float(np.abs(expected).max()))
    with pytest.raises(InputError, match="n_ctx=65: this model was trained for 1 to 64 tokens"):
        HookedTransformer.from_onnx(folder, "cpu", n_ctx=65)
    with pytest.raises(InputError, match=r"n_ctx=65: .* was trained for 1 to 64 tokens"):
        graphlens.export_model(checkpoint, tmp_path / "other", n_ctx=65)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        # transformers gives every layer the window, whatever a config says of the layers.
        *((name, {"layer_types": ["full_attention"] * 3}, "layer_types") for name in ("mistral", "mixtral", "phi3")),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("smollm3", {"no_rope_layers": [1]}, "cannot build the model"),
        *((name, {"head_dim": 4}, "head_dim=4") for name in ("opt", "neox", "stablelm")),
        (
            "neox",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.01}},
            "partial_rot",
        ),
    ],
)
def test_what_transformers_ignores_or_cannot_compute_is_refused(
    changed: Callable[..., Path], tmp_path: Path, name: str, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        graphlens.export_model(changed(name, **config), tmp_path / "out", verify=False)


def test_what_is_off_where_transformers_has_it_on_is_refused(family_checkpoint: Callable[[str], Path]) -> None:
    """By a family that reads less than it should."""
    config = read_checkpoint(family_checkpoint("neox")).hf_config()
    read = ConfigReader(config, "mine")
    known = frozenset(config.to_dict()) - {"use_parallel_residual"}
    read.refuse_unread(known)
    config.use_parallel_residual = False
    with pytest.raises(ExportError, match=r"mine: config\.json sets use_parallel_residual=False"):
        read.refuse_unread(known)


def test_a_graph_of_windows_whose_manifest_names_none_is_refused(family_folder: Callable[[str], Path]) -> None:
    model = surgery.load(family_folder("mistral"))
    manifest = surgery.read_manifest(model)
    write_manifest(model, replace(manifest, config=replace(manifest.config, window_size=None)))
    with pytest.raises(ModelFileError, match="'local_mask', and its manifest names no window"):
        surgery.with_past(model)


def test_a_weight_that_is_a_tensor_times_zero_is_no_view(family_folder: Callable[[str], Path]) -> None:
    """No weight could be written back to it."""
    text = surgery.read_manifest(surgery.load(family_folder("gemma3"))).to_json()
    data = json.loads(text)
    data["weights"]["embed.W_E"]["times"] = 0.0
    with pytest.raises(ModelFileError, match=r"times of the weight 'embed\.W_E' is 0\.0"):
        Manifest.from_json(json.dumps(data))


def test_experts_have_no_biases_to_accumulate(family_model: Callable[[str], HookedTransformer]) -> None:
    model = family_model("mixtral")
    assert np.array_equal(model.accumulated_bias(3), model.accumulated_bias(3, include_mlp_biases=False))


def test_multiplied_logits_are_read_out_a_column_at_a_time(family_model: Callable[[str], HookedTransformer]) -> None:
    """As those of every other model: a sweep need not compute all of them."""
    model = family_model("granite")
    tokens = prompt(model.cfg.d_vocab, 2, 9)
    _, cache = model.run_with_cache(tokens[::-1])
    metric = LogitDiff(7, 60)
    found = sweep(model, tokens, [Site("blocks.1.hook_resid_pre", position=4)], cache, metric)
    assert model.runner.engine.proof.unembedding == "W_U"

    def patch(x: np.ndarray, hook: Any) -> None:
        x[:, 4] = cache["blocks.1.hook_resid_pre"][:, 4]

    edited = metric(model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", patch)]))
    assert np.abs(found.values - edited).max() <= 1e-5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda spec: replace(spec, head="lm_foot"), "lm_foot"),
        (lambda spec: replace(spec, ln1="norm_1"), "norm_1"),
        (lambda spec: replace(spec, attention=replace(spec.attention, q="query")), "query"),
        (lambda spec: replace(spec, attention=replace(spec.attention, d_head=7)), "RuntimeError: .*shape"),
    ],
)
def test_a_spec_that_is_not_the_model_is_said_so(
    wrong: Callable[[Spec], Spec], said: str, family_checkpoint: Callable[[str], Path]
) -> None:
    checkpoint = read_checkpoint(family_checkpoint("llama"))
    config = checkpoint.hf_config()
    with pytest.raises(ExportError, match=f"transformers' model is not what the family's Spec says .*{said}"):
        trace(config, wrong(checkpoint.family.spec_of(config, "mine")))


def test_windows_that_contradict_one_another_are_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed("qwen2-window", use_sliding_window=False)
    with pytest.raises(ExportError, match="gives layers the type 'sliding_attention' and no sliding_window"):
        graphlens.export_model(folder, tmp_path / "out", verify=False)
    with pytest.raises(ExportError, match="sliding_window=0, and it must be a whole number above 0"):
        graphlens.export_model(changed("mistral", sliding_window=0), tmp_path / "out", verify=False)


def test_a_checkpoint_that_transformers_cannot_run_is_said_to_be_one(
    changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("the size of tensor a (11) must match")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fail)
    with pytest.raises(ExportError, match=r"transformers itself cannot run this checkpoint \(RuntimeError: the size"):
        graphlens.export_model(changed("llama"), tmp_path / "out", announce=lambda _: None)


def test_a_model_whose_training_length_is_not_known_says_so(family_checkpoint: Callable[[str], Path]) -> None:
    """Bloom's config names none; 2,048 is TransformerLens's."""
    checkpoint = read_checkpoint(family_checkpoint("bloom"))
    spec = checkpoint.family.spec_of(checkpoint.hf_config(), "bloom")
    with pytest.raises(InputError, match=r"n_ctx=4096: tiny takes 1 to 2048 tokens, as in TransformerLens: how long"):
        checkpoint.family.model_config(spec, "tiny", "float32", n_ctx=4096)
    assert checkpoint.family.model_config(spec, "tiny", "float32").n_ctx == 2048
