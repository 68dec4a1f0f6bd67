"""Models from a config of TransformerLens's against TransformerLens 3.9's HookedTransformer of the same config and weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_configs import CONFIGS, Lens, bound, lens_model, settings_of

import graphlens
from graphlens.errors import ExportError, InputError
from graphlens.file.processing import STEPS
from graphlens.pipelines import from_config
from graphlens.surgery import process_weights

TOKENS = np.random.default_rng(3).integers(0, 23, (2, 7))
_PROCESSED = STEPS[:4]


@dataclasses.dataclass
class Pair:
    """A config's model in both libraries."""

    name: str
    theirs: Lens
    ours: graphlens.HookedTransformer
    folder: Path


@pytest.fixture(scope="module", autouse=True)
def own_graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Graphs that this session made, and none of an earlier state of the code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHLENS_CACHE", str(tmp_path_factory.getbasetemp() / "lens-graphs"))
        yield


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    theirs = lens_model(CONFIGS[name])
    folder = bound(CONFIGS[name], theirs, tmp_path_factory.mktemp(name) / "model")
    return Pair(name, theirs, graphlens.HookedTransformer.from_onnx(folder), folder)


def close(ours: Any, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    expected = theirs.detach().numpy()
    scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=tolerance * scale)


@contextlib.contextmanager
def _set(model: graphlens.HookedTransformer, flag: str) -> Iterator[None]:
    """Sets a flag for a block."""
    getattr(model, f"set_{flag}")(True)
    try:
        yield
    finally:
        getattr(model, f"set_{flag}")(False)


def test_every_activation_is_transformerlens(pair: Pair) -> None:
    logits, cache = pair.ours.run_with_cache(TOKENS)
    expected, others = pair.theirs.run_with_cache(torch.from_numpy(TOKENS))
    close(logits, expected)
    assert list(cache.keys()) == list(others.keys())
    for name, value in others.items():
        assert tuple(cache[name].shape) == tuple(value.shape), name
        close(cache[name], value)


def test_an_edit_at_every_hook_point_changes_the_logits_alike(pair: Pair) -> None:
    rng = np.random.default_rng(5)
    _, cache = pair.ours.run_with_cache(TOKENS)
    for name in cache:
        noise = rng.standard_normal(cache[name].shape).astype(np.float32)

        def ours(value: Any, hook: Any, noise: Any = noise) -> None:
            value += noise

        def theirs(value: Any, hook: Any, noise: Any = noise) -> Any:
            return value + torch.from_numpy(noise)

        expected = pair.theirs.run_with_hooks(torch.from_numpy(TOKENS), fwd_hooks=[(name, theirs)])
        close(pair.ours.run_with_hooks(TOKENS, fwd_hooks=[(name, ours)]), expected)


def test_gradients_are_transformerlens(pair: Pair) -> None:
    if pair.ours.cfg.d_vocab_out < 23:
        pytest.skip("the loss needs a logit for each token")
    loss, cache = pair.ours.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    pair.theirs.requires_grad_(True)
    try:
        expected, others = pair.theirs.run_with_cache(torch.from_numpy(TOKENS), return_type="loss", incl_bwd=True)
    finally:
        pair.theirs.requires_grad_(False)
    close(loss, expected)
    grads = [name for name in others if name.endswith("_grad")]
    assert {name for name in cache if name.endswith("_grad")} == set(grads)
    for name in grads:
        if ".ln1." in name:
            continue  # it fires three times there, and the cache keeps one of three gradients
        close(cache[name], others[name])


@pytest.mark.parametrize(
    "flag", ["use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_hook_tokens"]
)
def test_flagged_hook_points_are_transformerlens(pair: Pair, flag: str) -> None:
    if flag == "use_attn_in" and pair.ours.cfg.n_key_value_heads < pair.ours.cfg.n_heads:
        pytest.skip("refused, as in TransformerLens")
    if flag == "use_hook_mlp_in" and pair.ours.cfg.attn_only:
        with pytest.raises(InputError, match="no MLP"):
            pair.ours.set_use_hook_mlp_in(True)
        return
    theirs = pair.theirs
    if flag == "use_hook_tokens":
        theirs = lens_model({**CONFIGS[pair.name], flag: True})
    else:
        setattr(theirs.cfg, flag, True)
    with _set(pair.ours, flag):
        try:
            _, cache = pair.ours.run_with_cache(TOKENS)
            _, others = theirs.run_with_cache(torch.from_numpy(TOKENS))
            assert list(cache.keys()) == list(others.keys())
            for name, value in others.items():
                close(cache[name], value)
        finally:
            setattr(theirs.cfg, flag, False)


def test_parts_of_the_forward_are_transformerlens(pair: Pair) -> None:
    for stop in (0, 1, 2):
        residual = pair.ours(TOKENS, stop_at_layer=stop)
        close(residual, pair.theirs(torch.from_numpy(TOKENS), stop_at_layer=stop))
        if "shortformer" not in pair.name:  # TransformerLens then wants the position embeddings besides
            again = pair.ours(residual, start_at_layer=stop)
            close(again, pair.theirs(torch.from_numpy(np.asarray(residual)), start_at_layer=stop))


def test_padding_is_masked_as_in_transformerlens(pair: Pair) -> None:
    mask = np.ones_like(TOKENS)
    mask[0, :3] = 0
    ours, cache = pair.ours.run_with_cache(TOKENS, attention_mask=mask)
    theirs, others = pair.theirs.run_with_cache(torch.from_numpy(TOKENS), attention_mask=torch.from_numpy(mask))
    close(ours, theirs)
    for name in ("blocks.1.attn.hook_pattern", "blocks.0.attn.hook_z"):
        close(cache[name], others[name])


def test_a_kv_cache_is_transformerlens(pair: Pair) -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    ones, start = torch.ones((2, 4), dtype=torch.int64), torch.from_numpy(TOKENS[:, :4])
    theirs = TransformerLensKeyValueCache.init_cache(pair.theirs.cfg, "cpu", 2)
    ours = graphlens.KeyValueCache.init_cache(pair.ours.cfg, batch_size=2)
    close(pair.ours(TOKENS[:, :4], past_kv_cache=ours), pair.theirs(start, past_kv_cache=theirs, attention_mask=ones))
    rest = torch.from_numpy(TOKENS[:, 4:])
    expected = pair.theirs(rest, past_kv_cache=theirs, attention_mask=ones[:, :3])
    close(pair.ours(TOKENS[:, 4:], past_kv_cache=ours), expected)


def test_processed_weights_predict_the_same(pair: Pair, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if pair.name == "grouped":  # values are cut to a range with their bias
            with pytest.raises(ExportError, match=r"hook_v' and 'blocks\.0\.attn\.hook_z"):
                process_weights(pair.folder, tmp_path / "refused")
        folder = process_weights(pair.folder, tmp_path / "processed", fold_value_biases=pair.name != "grouped")
    processed = graphlens.HookedTransformer.from_onnx(folder)
    ours, expected = processed(TOKENS), pair.ours(TOKENS)
    difference = (
        torch.from_numpy(np.asarray(ours)).log_softmax(-1),
        torch.from_numpy(np.asarray(expected)).log_softmax(-1),
    )
    close(*difference)


# In which TransformerLens's processing leaves the predictions as they are, and does not fail.
_SAME = (
    "plain",
    "ln_pre",
    "rms",
    "rms_pre",
    "rotary",
    "local",
    "parallel",
    "llama_like",
    "no_norm",
    "alibi",
    "solu_ln",
)


@pytest.mark.parametrize("name", _SAME)
def test_processed_weights_are_transformerlens(name: str, tmp_path: Path) -> None:
    theirs = lens_model(CONFIGS[name])
    folder = bound(CONFIGS[name], theirs, tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = graphlens.HookedTransformer.from_onnx(process_weights(folder, tmp_path / "processed"))
        theirs.load_and_process_state_dict(copy.deepcopy(theirs.state_dict()))
    logits, cache = ours.run_with_cache(TOKENS)
    expected, others = theirs.run_with_cache(torch.from_numpy(TOKENS))
    close(logits, expected)
    assert ours.cfg.normalization_type == theirs.cfg.normalization_type
    for key, value in others.items():
        close(cache[key], value)
    state = theirs.state_dict()
    for key, value in ours.weights.items():
        prefix, _, leaf = key.rpartition(".")
        close(value, state[key if key in state else f"{prefix}._{leaf}"])


@pytest.mark.parametrize("name", ["plain", "attn_only_no_norm", "solu_ln", "no_norm", "llama_like"])
def test_the_first_blocks_alone(name: str, tmp_path: Path) -> None:
    from graphlens import surgery

    theirs = lens_model(CONFIGS[name])
    folder = bound(CONFIGS[name], theirs, tmp_path / "model")
    surgery.save(surgery.first_layers(surgery.load(folder), 1), tmp_path / "short")
    ours = graphlens.HookedTransformer.from_onnx(tmp_path / "short")
    theirs.blocks, theirs.cfg.n_layers = theirs.blocks[:1], 1
    close(ours(TOKENS), theirs(torch.from_numpy(TOKENS)))


def test_the_graph_is_made_once_for_all_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    config = CONFIGS["attn_only"]
    bound(config, lens_model(config, 0), tmp_path / "one")
    monkeypatch.setattr("graphlens.export.trace.trace", lambda *_: pytest.fail("it was traced again"))
    theirs = lens_model({**config, "seed": 3, "init_mode": "kaiming_uniform", "use_attn_result": True}, 1)
    other = graphlens.HookedTransformer.from_onnx(bound(config, theirs, tmp_path / "two"))
    close(other(TOKENS), theirs(torch.from_numpy(TOKENS)))
    assert len(list((tmp_path / "cache" / "graphs").iterdir())) == 1


def test_a_damaged_graph_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    config = CONFIGS["attn_only"]
    graph = from_config.graph_of(settings_of(config)) / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    theirs = lens_model(config)
    close(
        graphlens.HookedTransformer.from_onnx(bound(config, theirs, tmp_path / "model"))(TOKENS),
        theirs(torch.from_numpy(TOKENS)),
    )


def test_the_names_and_shapes_are_those_of_the_state_dict() -> None:
    for name, config in CONFIGS.items():
        state = {
            key: tuple(value.shape)
            for key, value in lens_model(config).state_dict().items()
            if key.rpartition(".")[2] not in ("mask", "IGNORE", "rotary_sin", "rotary_cos")
        }
        if name == "alibi":
            del state["pos_embed.W_pos"]  # TransformerLens has it, and never reads it
        assert from_config.state_shapes(settings_of(config)) == state, name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": 4, "experts_per_token": 2}, "num_experts=4.*experts"),
        ({"use_yarn_rope": True}, "use_yarn_rope=True.*YaRN"),
        ({"use_attention_sinks": True}, "use_attention_sinks"),
        ({"ungroup_grouped_query_attention": True}, "ungroup_grouped_query_attention"),
        ({"act_fn": "xielu"}, "act_fn='xielu'"),
        ({"act_fn": "solu_ln", "gated_mlp": True}, "W_in"),
        ({"original_architecture": "Olmo2ForCausalLM"}, "Olmo2ForCausalLM"),
        ({"positional_embedding_type": "relative_positional_bias"}, "relative_positional_bias"),
        ({"parallel_attn_mlp": True, "attn_only": True}, "exclude each other"),
        ({"normalization_type": "BatchNorm"}, "BatchNorm"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow=3.*silently wrong"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=f"^this config: .*{said}"):
        from_config.read_config({**settings_of(CONFIGS["plain"]), **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("blocks.0.attn.W_Q"), r"lacks 'blocks.0.attn.W_Q' \[3, 11, 5\]"),
        (lambda state: state.update({"blocks.2.ln1.w": np.ones(11)}), "holds 'blocks.2.ln1.w'"),
        (lambda state: state.update({"ln_final.w": np.ones(12)}), r"'ln_final.w' has shape \[12\].*asks for \[11\]"),
        (lambda state: state.update({"ln_final.w": np.ones(11, int)}), "'ln_final.w' is int64"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    state = dict(lens_model(CONFIGS["plain"]).state_dict())
    change(state)
    with pytest.raises(InputError, match=f"the state dict.*{said}"):
        from_config.bind(settings_of(CONFIGS["plain"]), state, tmp_path / "model")
    assert not (tmp_path / "model").exists()
