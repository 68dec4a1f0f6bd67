"""Weights as attributes: views where nothing needs copying, names, errors, and what follows from the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, InputError
from graphlens.file.manifest import WeightView
from graphlens.file.names import get_act_name
from graphlens.file.safetensors import TensorEntry, WeightStore, write_safetensors


def test_a_layers_weights_are_views_of_the_file_and_stacks_are_copies(tiny: HookedTransformer) -> None:
    mapped = tiny.weights["embed.W_E"]
    file = next(iter(tiny.weights.opened.values())).bytes
    start, stop = file.ctypes.data, file.ctypes.data + file.size
    block = tiny.blocks[1]
    views = [tiny.W_E, tiny.W_U, tiny.W_pos, block.attn.W_Q, block.attn.b_K, block.attn.W_O, block.mlp.W_in]
    for view in [mapped, *views, block.ln1.w]:
        assert start <= view.ctypes.data < stop
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "b_in", "W_out", "b_out"):
        part = "mlp" if name.endswith(("in", "out")) else "attn"
        stack = getattr(tiny, name)
        assert not start <= stack.ctypes.data < stop
        assert not stack.flags.writeable
        for layer, each in enumerate(tiny.blocks):
            np.testing.assert_array_equal(stack[layer], getattr(getattr(each, part), name))


def test_names_shapes_and_sizes(tiny: HookedTransformer) -> None:
    state = tiny.state_dict()
    assert list(state) == [name for name, _ in tiny.named_parameters()]
    assert set(tiny.weights) <= set(state)
    assert tiny.n_params_total == sum(array.size for array in tiny.parameters())
    np.testing.assert_array_equal(state["unembed.b_U"], np.zeros(tiny.cfg.d_vocab, np.float32))
    np.testing.assert_array_equal(tiny.b_U, tiny.unembed.b_U)
    np.testing.assert_array_equal(tiny.W_E_pos, np.concatenate([tiny.W_E, tiny.W_pos]))
    assert tiny.W_gate is None
    assert tiny.all_head_labels()[5] == "L1H1"
    assert len(tiny.all_head_labels()) == tiny.cfg.n_layers * tiny.cfg.n_heads


def test_hook_points_are_attributes(tiny: HookedTransformer) -> None:
    for name, point in tiny.hook_dict.items():
        found: Any = tiny
        for part in name.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        assert found is point
    assert "hook_z" in dir(tiny.blocks[0].attn)
    assert "W_Q" in repr(tiny.blocks[0].attn)
    assert copy.copy(tiny.blocks[0]).attn.hook_z is tiny.hook_dict[get_act_name("z", 0)]


def test_what_is_not_there_is_an_attribute_error_that_says_what_is(tiny: HookedTransformer) -> None:
    assert not hasattr(tiny.blocks[0], "mixer")
    with pytest.raises(AttributeError, match=r"blocks\.0\.attn .*W_Q"):
        _ = tiny.blocks[0].attn.W_P
    with pytest.raises(AttributeError, match=r"hook_z"):
        _ = tiny.blocks[0].attn.hook_zz
    with pytest.raises(IndexError):
        _ = tiny.blocks[tiny.cfg.n_layers]
    for target in (tiny.blocks[0].attn, tiny):
        with pytest.raises(AttributeError):
            target.W_Q = tiny.W_Q
    for part, name in (
        (tiny.blocks[0].attn, "W_Q"),
        (tiny.embed, "W_E"),
        (tiny.ln_final, "w"),
        (tiny.blocks[1].mlp, "b_in"),
    ):
        with pytest.raises(InputError, match=rf"model\.set_weights\({{'.*{name}': new}}\)"):
            setattr(part, name, np.zeros(3))
    with pytest.raises(InputError, match=r"blocks\.0\.mlp = .*: parts of a model cannot be replaced"):
        tiny.blocks[0].mlp = None


def test_the_embedding_and_the_end_of_the_model_reproduce_the_run(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    logits, cache = tiny.run_with_cache(tokens)
    np.testing.assert_array_equal(tiny.embed(tokens), cache["hook_embed"])
    final = tiny.ln_final(cache["resid_post", -1])
    np.testing.assert_allclose(final, cache["unembed.hook_in"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(tiny.unembed(final), logits, rtol=0, atol=2e-4)
    half = tiny.ln_final(cache["resid_post", -1].astype(np.float16))
    assert half.dtype == tiny.unembed(half).dtype == np.float16
    np.testing.assert_allclose(half, final, rtol=0, atol=3e-2)
    ln1 = tiny.blocks[1].ln1
    scaled = cache["normalized", 1, "ln1"] * ln1.w + ln1.b
    np.testing.assert_allclose(ln1(cache["resid_pre", 1]), scaled, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="outside the vocabulary"):
        tiny.embed(np.asarray([tiny.cfg.d_vocab]))


def test_residual_directions_are_columns_of_w_u(tiny: HookedTransformer) -> None:
    ids = np.asarray([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(tiny.tokens_to_residual_directions(ids), tiny.W_U.T[ids])
    token = tiny.to_single_token(" John")
    for one in (token, " John", np.asarray([token]), np.asarray([[token]])):
        np.testing.assert_array_equal(tiny.tokens_to_residual_directions(one), tiny.W_U[:, token])
    for bad in (-1, tiny.cfg.d_vocab, " John Mary", 1.5):
        with pytest.raises(InputError):
            tiny.tokens_to_residual_directions(bad)


def test_accumulated_bias_is_what_no_activation_explains(tiny: HookedTransformer) -> None:
    n_layers = tiny.cfg.n_layers
    np.testing.assert_allclose(tiny.accumulated_bias(n_layers), tiny.b_O.sum(0) + tiny.b_out.sum(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        tiny.accumulated_bias(1, mlp_input=True, include_mlp_biases=False), tiny.b_O[:2].sum(0), rtol=0, atol=1e-6
    )
    assert not tiny.accumulated_bias(0).any()
    for layer, mlp_input in ((-1, False), (n_layers + 1, False), (n_layers, True)):
        with pytest.raises(InputError, match="layer must be from 0 to"):
            tiny.accumulated_bias(layer, mlp_input)


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_scores_are_their_definition(tiny: HookedTransformer, mode: str) -> None:
    scores = tiny.all_composition_scores(mode)
    layers, heads = tiny.cfg.n_layers, tiny.cfg.n_heads
    assert scores.shape == (layers, heads, layers, heads)
    ov = tiny.W_V @ tiny.W_O
    qk = tiny.W_Q @ np.swapaxes(tiny.W_K, -1, -2)
    second = {"Q": qk, "K": np.swapaxes(qk, -1, -2), "V": ov}[mode]
    for l1, h1, l2, h2 in ((0, 1, 1, 2), (0, 0, 3, 3), (1, 3, 2, 0), (2, 2, 1, 1), (1, 0, 1, 1)):
        norm = np.linalg.norm
        whole = norm(ov[l1, h1] @ second[l2, h2]) / norm(ov[l1, h1]) / norm(second[l2, h2]) if l2 > l1 else 0
        np.testing.assert_allclose(scores[l1, h1, l2, h2], whole, rtol=1e-4)


def test_another_mode_of_composition_is_refused(tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="'q'"):
        tiny.all_composition_scores("q")


def test_factored_circuits_multiply_out(tiny: HookedTransformer) -> None:
    np.testing.assert_allclose(tiny.OV.AB, tiny.W_V @ tiny.W_O, rtol=0, atol=1e-5)
    block = tiny.blocks[2].attn
    np.testing.assert_allclose(block.QK.AB, block.W_Q @ np.swapaxes(block.W_K, -1, -2), rtol=0, atol=1e-5)
    np.testing.assert_allclose(block.OV.AB, tiny.OV.AB[2], rtol=0, atol=1e-5)


def test_bfloat16_weights_read_as_float32_and_half_as_it_is(tmp_path: Path) -> None:
    words = np.asarray([[0x3F80, 0xC000, 0x0001], [0x7F7F, 0x3EAB, 0x0000]], np.uint16)  # 1, -2, a subnormal, ...
    half = np.asarray([1.5, -2.0], np.float16)
    entries = {"a": TensorEntry("BF16", (2, 3), 0, 12), "b": TensorEntry("F16", (2,), 0, 4)}
    write_safetensors(tmp_path / "w.safetensors", entries, [words, half])
    views = {"a": WeightView("w.safetensors", "a", permute=(1, 0)), "b": WeightView("w.safetensors", "b")}
    store = WeightStore(tmp_path, views)
    expected = (words.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(store["a"], expected.T)
    assert store["a"][0, 0] == 1
    assert store["a"][1, 0] == -2
    assert (store["a"].dtype, store["b"].dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(store["b"], half)
    assert list(store) == ["a", "b"]
    assert len(store) == 2
    assert store.get("c") is None
    with pytest.raises(KeyError):
        store["c"]


def test_norm_weights_that_were_folded_away_leave_the_normalisation(
    tiny: HookedTransformer, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = tiny.run_with_cache(tokens)
    folded = {name: view for name, view in tiny.weights.views.items() if not name.startswith("ln_final.")}
    monkeypatch.setattr(tiny.weights, "views", folded)
    found = tiny.ln_final(cache["resid_post", -1])
    np.testing.assert_allclose(found, cache["ln_final.hook_normalized"], rtol=0, atol=1e-5)
    assert not hasattr(tiny.ln_final, "w")
    assert "ln_final.w" not in tiny.state_dict()
