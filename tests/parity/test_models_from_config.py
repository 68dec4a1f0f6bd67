"""``HookedTransformer(cfg)`` against TransformerLens 3.9's, as toy models are made with it: the same weights for the same
seed, the same activations, gradients, text, state dicts and processing."""

from __future__ import annotations

import dataclasses
import pickle
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig as LensConfig

import graphlens
import graphlens.torch
from graphlens import InputError, StateDictError
from graphlens.model.initial import INIT_MODES, initial_weights
from graphlens.torch import HookedTransformer, HookedTransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
Call = dict[str, Any]

TOYS: dict[str, Call] = {
    # ARENA's two layers of attention alone, whose keys and queries alone see positions
    "attention only": {
        "n_layers": 2, "n_heads": 3, "d_model": 40, "d_head": 7, "n_ctx": 19, "d_vocab": 61, "attn_only": True,
        "normalization_type": None, "positional_embedding_type": "shortformer", "seed": 398, "use_attn_result": True,
    },
    # one layer without norms, another vocabulary of outputs
    "modular addition": {
        "n_layers": 1, "n_heads": 4, "d_model": 32, "d_head": 8, "d_mlp": 36, "act_fn": "relu", "n_ctx": 5,
        "normalization_type": None, "d_vocab": 23, "d_vocab_out": 22, "seed": 999,
    },
    # a classifier that looks both ways
    "brackets": {
        "n_ctx": 14, "d_model": 28, "d_head": 14, "n_heads": 2, "d_mlp": 30, "n_layers": 2, "d_vocab": 5,
        "attention_dir": "bidirectional", "act_fn": "relu", "d_vocab_out": 2, "normalization_type": "LN", "seed": 1,
    },
    "sorted lists": {
        "n_layers": 1, "n_heads": 2, "d_model": 24, "d_head": 12, "n_ctx": 15, "d_vocab": 27, "act_fn": "relu",
        "normalization_type": "LN", "attn_only": True, "seed": 42,
    },
    "llama": {
        "n_layers": 2, "n_heads": 4, "n_key_value_heads": 2, "d_model": 20, "d_head": 6, "n_ctx": 17, "d_vocab": 33,
        "act_fn": "silu", "gated_mlp": True, "d_mlp": 21, "normalization_type": "RMS", "seed": 3,
        "positional_embedding_type": "rotary", "rotary_dim": 4, "init_mode": "xavier_normal",
    },
    "solu": {
        "n_layers": 2, "n_heads": 3, "d_model": 18, "d_head": 6, "n_ctx": 16, "d_vocab": 29, "act_fn": "solu_ln",
        "d_mlp": 19, "normalization_type": "LN", "seed": 4, "init_mode": "kaiming_uniform",
    },
}  # fmt: skip


def lens_of(call: Call) -> transformer_lens.HookedTransformer:
    return transformer_lens.HookedTransformer(LensConfig(**call)).eval()


def stirred(lens: transformer_lens.HookedTransformer) -> dict[str, torch.Tensor]:
    """A state with nothing at its beginning: biases and norms too."""
    torch.manual_seed(17)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return {name: value.clone() for name, value in lens.state_dict().items()}


def tokens_of(call: Call, batch: int = 3) -> torch.Tensor:
    length = min(9, call["n_ctx"] - 1)
    return torch.from_numpy(np.random.default_rng(5).integers(0, call["d_vocab"], (batch, length)))


def close(found: torch.Tensor, expected: torch.Tensor, what: str, within: float = 5e-5) -> None:
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape, what
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(found), finite), what
    if finite.any():
        scale = max(1.0, float(expected[finite].abs().max()))
        assert float((found[finite] - expected[finite]).abs().max()) <= within * scale, what


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHLENS_CACHE", str(tmp_path_factory.getbasetemp() / "configs-cache"))
        yield


# Drawing


@pytest.mark.parametrize("mode", INIT_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_seed_draws_the_same_weights(mode: str, dtype: torch.dtype) -> None:
    for call in (*TOYS.values(), {**TOYS["llama"], "positional_embedding_type": "alibi", "post_embedding_ln": True}):
        call = {**call, "init_mode": mode, "dtype": dtype}
        expected = dict(lens_of(call).named_parameters())
        found = initial_weights(HookedTransformerConfig(**call))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(found[name], value.detach().numpy()), name


def test_without_a_seed_torchs_generator_decides_and_goes_on_as_there() -> None:
    call = {**TOYS["modular addition"], "seed": None}
    torch.manual_seed(8)
    expected = lens_of(call).state_dict()
    next_there = torch.rand(3)
    for _ in range(2):  # whether the graph is in the cache or has to be made
        torch.manual_seed(8)
        model = HookedTransformer(HookedTransformerConfig(**call))
        assert torch.equal(torch.rand(3), next_there)
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), name


# Running


@pytest.fixture(scope="module", params=TOYS)
def pair(request: pytest.FixtureRequest) -> tuple[Call, HookedTransformer, transformer_lens.HookedTransformer]:
    call = TOYS[request.param]
    lens, model = lens_of(call), HookedTransformer(HookedTransformerConfig(**call))
    assert model.state_dict().keys() == dict(lens.named_parameters()).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, lens.state_dict()[name]), name
    assert model.load_state_dict(stirred(lens)) == ([], [])
    return call, model, lens


Pair = tuple[Call, HookedTransformer, transformer_lens.HookedTransformer]


def test_logits_and_every_activation(pair: Pair) -> None:
    call, model, lens = pair
    tokens = tokens_of(call)
    expected, expected_cache = lens.run_with_cache(tokens)
    logits, cache = model.run_with_cache(tokens)
    close(logits, expected, "logits")
    assert list(cache.keys()) == list(expected_cache.keys())
    for name, value in expected_cache.items():
        close(cache[name], value, name)
    assert set(model.hook_dict) == set(lens.hook_dict) & expected_cache.cache_dict.keys()


def test_the_configuration_is_the_one_given(pair: Pair) -> None:
    call, model, lens = pair
    assert model.cfg.to_dict() == HookedTransformerConfig(**call).to_dict()
    there = {**lens.cfg.to_dict(), "device": "cpu"}
    assert model.cfg.to_dict() == there


def test_hooks_edit(pair: Pair) -> None:
    call, model, lens = pair
    tokens = tokens_of(call)

    def halve(value: torch.Tensor, hook: object) -> torch.Tensor:
        return value / 2

    for name in [*model.hook_dict][2:]:
        edits = [(name, halve)]
        close(model.run_with_hooks(tokens, fwd_hooks=edits), lens.run_with_hooks(tokens, fwd_hooks=edits), name)


def test_gradients(pair: Pair) -> None:
    call, model, lens = pair
    tokens = tokens_of(call)
    found, expected = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    # A hook of ln1's fires for queries, keys and values apart there, and once here.
    names = [
        name for name in model.hook_dict if name.endswith(("resid_pre", "hook_z", "hook_post", "final.hook_scale"))
    ]
    for kept, one in ((found, model), (expected, lens)):
        hooks = [(name, lambda value, hook, kept=kept: kept.__setitem__(hook.name, value.clone())) for name in names]
        with one.hooks(bwd_hooks=hooks):
            (one(tokens)[:, -1] * torch.arange(1.0, 1 + one.cfg.d_vocab_out)).sum().backward()
    assert found.keys() == expected.keys() == set(names)
    for name in names:
        close(found[name], expected[name], name)


def test_generating(pair: Pair) -> None:
    call, model, lens = pair
    if call.get("attention_dir") == "bidirectional" or call.get("d_vocab_out", call["d_vocab"]) != call["d_vocab"]:
        pytest.skip("no language model")
    tokens = tokens_of(call, batch=1)[:, :4]
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    expected = lens.generate(tokens, use_past_kv_cache=False, **options)
    assert torch.equal(model.generate(tokens, use_past_kv_cache=False, **options), expected)
    assert torch.equal(model.generate(tokens, **options), expected)


def test_weights_have_transformerlenss_names_and_shapes(pair: Pair) -> None:
    _, model, lens = pair
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_E", "W_U", "b_U"):
        assert torch.equal(getattr(model, name), getattr(lens, name)), name
    assert model.n_params_total == lens.n_params_total


@pytest.mark.parametrize("toy", ["attention only", "sorted lists", "llama", "solu"])
def test_processing_a_state_dict(toy: str) -> None:
    call = TOYS[toy]
    lens, model = lens_of(call), HookedTransformer(HookedTransformerConfig(**call))
    state, tokens = stirred(lens), tokens_of(call)
    lens.load_and_process_state_dict(dict(state))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without norms there are none to fold, as both say
        model.load_and_process_state_dict(dict(state))
    assert model.cfg.normalization_type == lens.cfg.normalization_type
    expected, expected_cache = lens.run_with_cache(tokens)
    logits, cache = model.run_with_cache(tokens)
    close(logits, expected, "logits")
    assert list(cache.keys()) == list(expected_cache.keys())
    for name, value in expected_cache.items():
        close(cache[name], value, name)
    for name, value in model.state_dict().items():
        close(value, lens.state_dict()[name], name)


@pytest.mark.parametrize("toy", ["sorted lists", "llama"])
def test_the_steps_of_processing_on_a_state_dict(toy: str) -> None:
    call = TOYS[toy]
    lens, model = lens_of(call), HookedTransformer(HookedTransformerConfig(**call))
    state = stirred(lens)
    rms = call["normalization_type"] == "RMS"
    steps: list[tuple[str, dict[str, bool]]] = [
        ("fold_layer_norm", {"fold_biases": not rms, "center_weights": not rms}),
        ("center_writing_weights", {}),
        ("center_unembed", {}),
        ("fold_value_biases", {}),
    ]
    for step, options in steps:
        given = {name: value.clone() for name, value in state.items()}
        expected = getattr(lens, step)({name: value.clone() for name, value in state.items()}, **options)
        found = getattr(model, step)(given, **options)
        assert found is given
        for name, value in expected.items():
            close(found[name], value, f"{step} {name}")


def test_init_weights_draws_again() -> None:
    call = TOYS["sorted lists"]
    lens, model = lens_of(call), HookedTransformer(HookedTransformerConfig(**call))
    model.load_state_dict(stirred(lens))
    lens.init_weights()
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, lens.state_dict()[name]), name


def test_the_examples_of_the_page_run() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "configs.md").read_text(encoding="utf-8")
    found = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    assert len(found) == 3
    namespace: dict[str, object] = {}
    for block in found:
        exec(compile(block, "configs.md", "exec"), namespace)


# What is ours


def test_it_is_quick_once_its_graph_is_there() -> None:
    call = {**TOYS["attention only"], "n_layers": 2}
    HookedTransformer(HookedTransformerConfig(**call))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        HookedTransformer(HookedTransformerConfig(**{**call, "seed": 12}))(tokens_of(call))
        best = min(best, time.perf_counter() - start)
    assert best <= 1.5  # measured 0.2 alone; the machine of the tests has others on it


def test_neither_building_nor_loading_writes_or_exports_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from graphlens.export import trace

    call = TOYS["modular addition"]
    model = HookedTransformer(HookedTransformerConfig(**call))

    def refuse(*_: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(trace, "trace", refuse)
    cache = Path(graphlens.torch.HookedTransformer.__module__ and model.runner.engine.folder).parent
    before = sorted(path.name for path in cache.iterdir())
    other = HookedTransformer({**HookedTransformerConfig(**{**call, "seed": 5, "init_mode": "muP"}).to_dict()})
    assert not torch.equal(other.W_E, model.W_E)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens_of(call)), model(tokens_of(call)))
    assert sorted(path.name for path in cache.iterdir()) == before


def test_a_config_goes_on_to_speak_for_its_models() -> None:
    call = {**TOYS["sorted lists"], "use_attn_result": False}
    cfg = HookedTransformerConfig(**call)
    one, two = HookedTransformer(cfg), HookedTransformer(cfg)
    cfg.use_attn_result = True
    for model in (one, two):
        assert model.cfg.use_attn_result
        assert "blocks.0.attn.hook_result" in model.hook_dict
    one.cfg.use_attn_result = False
    assert two.cfg.use_attn_result
    with pytest.raises(InputError, match="cannot become"):
        one.cfg.n_layers = 4
    cfg.dtype, cfg.n_layers = torch.float32, 1  # what they are
    with pytest.warns(UserWarning, match="for the models that are built next"):
        cfg.d_mlp = 7
    cfg.normalization_type = None  # of no model any more
    assert (cfg.normalization_type, one.cfg.normalization_type, one.cfg.d_mlp) == (None, "LN", 96)
    assert "ln_final.w" not in HookedTransformer(cfg).state_dict()
    again = HookedTransformer(one.cfg)  # as scripts make a model with other weights
    for name, value in again.state_dict().items():
        assert torch.equal(value, one.state_dict()[name]), name


def test_both_faces_and_dictionaries_and_transformerlenss_configs_build_the_same() -> None:
    call = TOYS["modular addition"]
    tokens = tokens_of(call)
    expected = HookedTransformer(HookedTransformerConfig(**call))(tokens)
    numpys = graphlens.HookedTransformer(graphlens.HookedTransformerConfig(**call))
    assert numpys.cfg.dtype == "float32"
    assert np.array_equal(numpys(tokens.numpy()), expected)
    assert torch.equal(HookedTransformer(call)(tokens), expected)
    assert torch.equal(HookedTransformer(LensConfig(**call))(tokens), expected)


def test_float64() -> None:
    call = {**TOYS["sorted lists"], "dtype": torch.float64}
    lens, model = lens_of(call), HookedTransformer(HookedTransformerConfig(**call))
    assert model.cfg.dtype == torch.float64
    close(model(tokens_of(call)), lens(tokens_of(call)), "logits", 1e-12)
    with pytest.raises(InputError, match=r"cfg\.dtype"):
        model.cfg.dtype = torch.float32


def test_a_tokenizer_gives_the_vocabulary(tiny_folder: Path) -> None:
    call = {**TOYS["sorted lists"], "n_ctx": 32, "d_vocab": -1}
    model = HookedTransformer(HookedTransformerConfig(**call, tokenizer_name="tiny-gpt2"), default_padding_side="left")
    tiny = graphlens.torch.HookedTransformer.from_onnx(tiny_folder)
    assert model.cfg.d_vocab == model.cfg.d_vocab_out == tiny.cfg.d_vocab
    assert model.cfg.default_padding_side == "left"
    assert torch.equal(model.to_tokens("When John and Mary"), tiny.to_tokens("When John and Mary"))
    assert model("When John").shape[-1] == tiny.cfg.d_vocab
    with pytest.raises(InputError, match="d_vocab is not set"):
        HookedTransformer(HookedTransformerConfig(**call))
    with pytest.warns(UserWarning, match="no tokenizer"):
        HookedTransformer(HookedTransformerConfig(**TOYS["sorted lists"]), default_padding_side="left")


def test_a_tokenizer_by_its_name_on_the_hub_fetches_no_more_than_that(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def fetched(name: str, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, allow_patterns))
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    call = {**TOYS["sorted lists"], "n_ctx": 32, "d_vocab": -1, "tokenizer_name": "gpt2-small"}
    model = HookedTransformer(HookedTransformerConfig(**call))
    assert asked[0][0] == "gpt2"
    assert not any(pattern.endswith(("safetensors", "*")) for pattern in asked[0][1])
    assert model.tokenizer is not None


@pytest.mark.filterwarnings("ignore:the config of a file")  # of tiny-llama, whose rotary frequencies are plain ones
@pytest.mark.parametrize(("name", "processed"), [("tiny-gpt2", False), ("tiny-llama", True)])
def test_a_model_is_built_from_the_config_of_a_file(name: str, processed: bool) -> None:
    kinds = (HookedTransformer.from_pretrained_no_processing, HookedTransformer.from_pretrained)
    file = kinds[processed](name)
    model = HookedTransformer(file.cfg)
    tokens = file.to_tokens("When John and Mary went")
    assert not torch.allclose(model(tokens), file(tokens))
    assert model.load_state_dict(file.state_dict()) == ([], [])
    close(model(tokens), file(tokens), "logits")
    assert set(model.hook_dict) == set(file.hook_dict)
    assert torch.equal(model.to_tokens("When John"), file.to_tokens("When John"))


def test_copies_and_pickles_keep_the_weights() -> None:
    call = TOYS["sorted lists"]
    model = HookedTransformer(HookedTransformerConfig(**call))
    model.load_state_dict(stirred(lens_of(call)))
    expected = model(tokens_of(call))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(tokens_of(call)), expected)
    assert again.cfg == model.cfg
    model.reset_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, lens_of(call).state_dict()[name]), name


def test_what_cannot_be_built_is_refused_by_name() -> None:
    call = TOYS["sorted lists"]
    for change, said in (
        ({"init_mode": "magic"}, "init_mode"),
        ({"num_experts": 2, "experts_per_token": 1, "attn_only": False}, "experts"),
        ({"n_devices": 2}, "n_devices"),
        ({"normalization_type": "BN"}, "normalization_type"),
    ):
        with pytest.raises(graphlens.GraphlensError, match=said):
            HookedTransformer(HookedTransformerConfig(**{**call, **change}))
    with pytest.raises(InputError, match="HookedEncoder"):
        graphlens.torch.HookedEncoder(HookedTransformerConfig(**call))


def test_a_state_dict_without_a_matrix_is_refused() -> None:
    call = TOYS["sorted lists"]
    model = HookedTransformer(HookedTransformerConfig(**call))
    state = dict(model.state_dict())
    del state["blocks.0.attn.W_Q"]
    with pytest.raises(StateDictError, match=r"blocks\.0\.attn\.W_Q"):
        model.load_and_process_state_dict(state)


def test_it_does_not_train_and_says_so() -> None:
    model = HookedTransformer(HookedTransformerConfig(**TOYS["sorted lists"]))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(InputError, match="does not train"):
        torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(InputError, match="does not train"):
        torch.optim.SGD([{"params": list(model.parameters())}], lr=1e-3)
    assert next(model.parameters()).is_leaf


def test_dataclass_tools_work_on_a_config() -> None:
    cfg = HookedTransformerConfig(**TOYS["sorted lists"])
    assert dataclasses.replace(cfg, n_layers=2).n_params == 2 * (cfg.n_params or 0)
    assert "n_layers" in {field.name for field in dataclasses.fields(cfg)}
