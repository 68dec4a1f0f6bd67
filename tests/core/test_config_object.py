"""``model.cfg`` as an object: it follows the model, and what is set on it is set on the model, told, or refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens import HookedTransformer, HookedTransformerConfig, InputError, StateDictError

TOKENS = np.array([[0, 5, 6, 7]])


@pytest.fixture
def model(tiny_folder: Path) -> HookedTransformer:
    return HookedTransformer.from_onnx(tiny_folder, "cpu")


def test_it_is_one_object_of_the_public_class(model: HookedTransformer) -> None:
    assert isinstance(model.cfg, HookedTransformerConfig)
    assert model.cfg is model.cfg
    assert model.cfg.n_params == model.cfg.n_layers * 12 * model.cfg.d_model**2
    assert (model.cfg.seed, model.cfg.init_weights, model.cfg.from_checkpoint) == (None, False, False)
    assert model.cfg.tokenizer_name == "tiny-gpt2"


def test_a_flag_that_is_set_on_it_is_set_on_the_model(model: HookedTransformer) -> None:
    cfg = model.cfg
    cfg.use_attn_result = True
    _, cache = model.run_with_cache(TOKENS)
    assert "blocks.0.attn.hook_result" in cache.cache_dict
    model.set_use_attn_result(False)
    assert not cfg.use_attn_result
    cfg.use_split_qkv_input = True
    with pytest.raises(InputError, match="exclude each other"):
        cfg.use_attn_in = True
    assert not cfg.use_attn_in
    with pytest.raises(InputError, match="True or False"):
        cfg.use_hook_mlp_in = "yes"  # type: ignore[assignment]


def test_text_defaults_that_are_set_on_it_are_the_models(model: HookedTransformer) -> None:
    before = model.to_tokens("When John").shape
    model.cfg.default_prepend_bos = not model.cfg.default_prepend_bos
    assert model.to_tokens("When John").shape != before
    model.cfg.default_padding_side = "left"
    assert model.to_tokens(["When John", "When"], prepend_bos=False)[1, 0] == model.tokenizer.pad_token_id
    with pytest.raises(InputError, match="padding_side"):
        model.cfg.default_padding_side = "up"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layers", 2), ("d_vocab", 4), ("act_fn", "relu"), ("normalization_type", None), ("attn_only", True),
        ("eps", 0.5), ("n_ctx", 5), ("dtype", "float64"), ("device", "cuda"), ("attn_scale", 2.0),
        ("positional_embedding_type", "rotary"), ("tokenizer_prepends_bos", False), ("processing", ("fold_ln",)),
        ("ungroup_grouped_query_attention", True), ("use_local_attn", True),
    ],
)  # fmt: skip
def test_what_the_graph_was_made_by_cannot_be_set(model: HookedTransformer, field: str, value: object) -> None:
    before = getattr(model.cfg, field)
    with pytest.raises(InputError, match=rf"cfg\.{field} is .* cannot become"):
        setattr(model.cfg, field, value)
    assert getattr(model.cfg, field) == before
    setattr(model.cfg, field, before)  # what it is already can be set


def test_what_only_tells_can_be_set(model: HookedTransformer) -> None:
    model.cfg.seed, model.cfg.model_name, model.cfg.checkpoint_index = 3, "mine", 9
    model.cfg.note = "of my own"  # type: ignore[attr-defined]
    assert (model.cfg.seed, model.cfg.model_name, model.cfg.checkpoint_index) == (3, "mine", 9)
    assert model.cfg.note == "of my own"  # type: ignore[attr-defined]
    assert model.cfg.to_dict()["note"] == "of my own"


def test_the_config_of_a_copy_is_of_the_copy(model: HookedTransformer) -> None:
    model.cfg.seed = 5
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.cfg == model.cfg
        other.cfg.use_attn_result = True
        assert other.cfg.use_attn_result
        assert not model.cfg.use_attn_result
        assert "blocks.0.attn.hook_result" in other.hook_dict
    other = copy.copy(model)
    other.cfg.default_prepend_bos = False
    assert (model.cfg.default_prepend_bos, other.cfg.default_prepend_bos) == (True, False)


def test_a_copy_of_it_is_of_no_model(model: HookedTransformer) -> None:
    for free in (copy.copy(model.cfg), copy.deepcopy(model.cfg), pickle.loads(pickle.dumps(model.cfg))):
        assert free == model.cfg
        free.n_layers, free.use_attn_result = 7, True
        assert free != model.cfg
        assert not model.cfg.use_attn_result
        assert free.architecture.n_layers == 7
    assert HookedTransformerConfig.from_dict(model.cfg.to_dict()).architecture == model.cfg.architecture


def test_it_outlives_the_model(tiny_folder: Path) -> None:
    cfg = HookedTransformer.from_onnx(tiny_folder, "cpu").cfg
    import gc

    gc.collect()
    assert cfg.normalization_type == "LN"
    assert cfg.n_layers == 4
    cfg.n_layers = 3
    assert cfg.n_layers == 3


# State dicts


def test_a_state_dict_is_loaded_without_its_file(model: HookedTransformer) -> None:
    state = {name: np.array(value) for name, value in model.state_dict().items()}
    before = model(TOKENS)
    state["blocks.1.attn.W_O"] *= 2
    found = model.load_state_dict({**state, "blocks.0.attn.mask": np.zeros((0, 0)), "blocks.0.attn.IGNORE": -np.inf})
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert np.array_equal(model.blocks[1].attn.W_O, state["blocks.1.attn.W_O"])
    changed = model(TOKENS)
    assert not np.allclose(changed, before)
    other = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    other.set_weights({"blocks.1.attn.W_O": state["blocks.1.attn.W_O"]})
    assert np.array_equal(other(TOKENS), changed)


def test_a_state_dict_that_does_not_fit_changes_nothing(model: HookedTransformer) -> None:
    state, before = model.state_dict(), model(TOKENS)
    with pytest.raises(StateDictError, match=r"missing: blocks\.0\.attn\.W_Q"):
        model.load_state_dict({name: value for name, value in state.items() if name != "blocks.0.attn.W_Q"})
    with pytest.raises(StateDictError, match="not its weights: what"):
        model.load_state_dict({**state, "what": np.zeros(3)})
    with pytest.raises(RuntimeError, match=r"embed\.W_E is \[.*\] here and \[2, 2\] there"):
        model.load_state_dict({**state, "embed.W_E": np.zeros((2, 2))}, strict=False)
    with pytest.raises(InputError, match="dictionary"):
        model.load_state_dict([1])  # type: ignore[arg-type]
    found = model.load_state_dict({"what": np.zeros(3), "unembed.b_U": state["unembed.b_U"]}, strict=False)
    assert found.unexpected_keys == ["what"]
    assert len(found.missing_keys) == len(state) - 1
    assert np.array_equal(model(TOKENS), before)


def test_weights_processed_in_memory_are_those_processed_in_a_file(model: HookedTransformer) -> None:
    from_file = HookedTransformer.from_pretrained("tiny-gpt2", device="cpu")
    model.process_weights_()
    assert model.cfg.normalization_type == "LNPre"
    assert model.cfg.processing == from_file.cfg.processing
    assert model.state_dict().keys() == from_file.state_dict().keys()
    for name, value in model.state_dict().items():
        assert np.array_equal(value, from_file.state_dict()[name]), name
    ours, cache = model.run_with_cache(TOKENS)
    theirs, other = from_file.run_with_cache(TOKENS)
    assert np.array_equal(ours, theirs)
    assert cache.keys() == other.keys()


def test_set_weights_are_processed_too(model: HookedTransformer) -> None:
    rng = np.random.default_rng(0)
    drawn = {
        name: rng.normal(0, 0.3, value.shape) for name, value in model.state_dict().items() if name in model.weights
    }
    drawn = {**model.state_dict(), **drawn}
    model.set_weights(drawn)
    logits = model(TOKENS)
    model.process_weights_()
    found = model(TOKENS)
    assert np.abs((found - found.mean(-1, keepdims=True)) - (logits - logits.mean(-1, keepdims=True))).max() < 1e-3
    assert "blocks.0.ln1.w" not in model.weights
    processed = model(TOKENS)
    model.set_weights({"unembed.W_U": np.zeros(model.W_U.shape)})
    model.reset_weights()
    assert np.array_equal(model(TOKENS), processed)
    # From the first state again: what the model was before is what counts, not what it is.
    model.load_and_process_state_dict(drawn, *[False] * 5)
    assert model.cfg.normalization_type == "LN"
    assert np.array_equal(model(TOKENS), logits)


def test_numpys_own_models_need_torch_to_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphlens.pipelines import adapters

    monkeypatch.setattr(adapters, "installed", lambda name: False)
    with pytest.raises(graphlens.RuntimeUnavailable, match=r"graphlens-onnx\[export\]"):
        HookedTransformer(HookedTransformerConfig(n_layers=1, d_model=8, d_head=4, n_ctx=5, d_vocab=7))
    with pytest.raises(InputError, match="d_vocab"):
        HookedTransformer(HookedTransformerConfig(n_layers=1, d_model=8, d_head=4, n_ctx=5))
