"""TransformerLens 3.9 itself as the reader: its numbers for our properties, its own functions run on our model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import graphlens
from graphlens import utils
from graphlens.torch import HookedTransformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformer_lens
    from lens_oracle import PROCESSING, oracle
    from transformer_lens import evals
    from transformer_lens.utilities import get_attention_mask
    from transformer_lens.utilities import test_prompt as prompt_test

PROMPT = "When John and Mary went to the store, John gave a drink to"
OTHER = "When John and Mary went to the store, Mary gave a drink to"
FOLDER = graphlens.embedded_model()
STACKS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out")


@pytest.fixture(scope="module")
def odd(odd_hooked: Path) -> HookedTransformer:
    return HookedTransformer.from_onnx(odd_hooked, "cpu")


@pytest.fixture(scope="module")
def odd_lens(odd_checkpoint: Path) -> Any:
    return oracle(odd_checkpoint)


def close(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    assert isinstance(found, torch.Tensor)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


# Weights


@pytest.mark.parametrize("name", [*STACKS, "W_E", "W_pos", "W_U", "b_U", "W_E_pos"])
def test_weights_are_transformerlens_exactly(odd: HookedTransformer, odd_lens: Any, name: str) -> None:
    found, expected = getattr(odd, name), getattr(odd_lens, name)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def test_weights_of_a_part_and_the_state_dict(odd: HookedTransformer, odd_lens: Any) -> None:
    for mine, theirs in zip(odd.blocks, odd_lens.blocks, strict=True):
        for part, names in (("attn", STACKS[:4]), ("mlp", ("W_in", "b_out")), ("ln1", ("w", "b")), ("ln2", ("w", "b"))):
            for name in names:
                assert torch.equal(getattr(getattr(mine, part), name), getattr(getattr(theirs, part), name))
    assert torch.equal(odd.ln_final.w, odd_lens.ln_final.w)
    mine, theirs = odd.state_dict(), odd_lens.state_dict()
    parameters = dict(odd_lens.named_parameters())
    assert set(mine) == set(parameters) <= set(theirs)
    assert all(torch.equal(mine[name], value) for name, value in parameters.items())
    assert odd.n_params_total == odd_lens.n_params_total
    assert sum(p.numel() for p in odd.parameters()) == odd_lens.n_params_total


@pytest.mark.parametrize("name", ["QK", "OV"])
def test_circuits(odd: HookedTransformer, odd_lens: Any, name: str) -> None:
    mine, theirs = getattr(odd, name), getattr(odd_lens, name)
    close(mine.AB, theirs.AB)
    close(mine.S, theirs.S)
    close(mine.norm(), theirs.norm())
    close(mine[1, 2].AB, theirs[1, 2].AB)
    close(getattr(odd.blocks[1].attn, name).AB, getattr(odd_lens.blocks[1].attn, name).AB)
    direction = odd_lens.W_E[3]
    close(direction @ mine[0, 1], direction @ theirs[0, 1])
    close((odd_lens.W_E @ mine[0, 1]).AB, (odd_lens.W_E @ theirs[0, 1]).AB)


def test_the_end_of_the_model(odd: HookedTransformer, odd_lens: Any) -> None:
    residual = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    close(odd.ln_final(residual), odd_lens.ln_final(residual))
    close(odd.blocks[1].ln2(residual), odd_lens.blocks[1].ln2(residual))
    close(odd.unembed(residual), odd_lens.unembed(residual))
    tokens = torch.arange(10).view(2, 5)
    close(odd.embed(tokens), odd_lens.embed(tokens))


def test_what_follows_from_the_weights(odd: HookedTransformer, odd_lens: Any) -> None:
    for layer in range(4):
        for mlp_input in (False, True)[: 1 + (layer < 3)]:
            for with_mlps in (True, False):
                close(
                    odd.accumulated_bias(layer, mlp_input, with_mlps),
                    odd_lens.accumulated_bias(layer, mlp_input, with_mlps),
                )
    for mode in ("Q", "K", "V"):
        close(odd.all_composition_scores(mode), odd_lens.all_composition_scores(mode))
    assert odd.all_head_labels() == odd_lens.all_head_labels()
    for tokens in (7, torch.tensor(7), torch.tensor([7]), torch.tensor([[7, 8], [9, 100]])):
        close(odd.tokens_to_residual_directions(tokens), odd_lens.tokens_to_residual_directions(tokens))


@pytest.mark.parametrize("processed", [False, True])
def test_the_configuration(processed: bool) -> None:
    mine = HookedTransformer.from_pretrained("tiny-gpt2") if processed else HookedTransformer.from_onnx(FOLDER, "cpu")
    theirs = oracle(FOLDER, tokenizer=True, **dict.fromkeys(PROCESSING, processed))
    names = "n_layers n_heads d_model d_head d_mlp d_vocab d_vocab_out n_ctx act_fn eps attn_scale normalization_type \
        attn_only positional_embedding_type dtype default_prepend_bos original_architecture n_params gated_mlp \
        parallel_attn_mlp attention_dir"
    for name in names.split():
        assert getattr(mine.cfg, name) == getattr(theirs.cfg, name), name
    assert mine.cfg.normalization_type == ("LNPre" if processed else "LN")


# Text


def test_no_text_is_no_token(model: HookedTransformer, lens: Any) -> None:
    mine, theirs = (either.to_tokens("", prepend_bos=False) for either in (model, lens))
    assert mine.shape == theirs.shape == (1, 0)
    assert mine.dtype == theirs.dtype
    assert model.to_str_tokens("", prepend_bos=False) == []


def test_a_transformers_tokenizer_is_set(lens: Any) -> None:
    mine = HookedTransformer.from_onnx(FOLDER, "cpu")
    mine.tokenizer = None
    mine.set_tokenizer(transformers.AutoTokenizer.from_pretrained(FOLDER), default_padding_side="left")
    assert torch.equal(mine.to_tokens([PROMPT, "When"]), lens.to_tokens([PROMPT, "When"], padding_side="left"))


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens(model: HookedTransformer, lens: Any, bos: bool | None, side: str) -> None:
    default = {} if bos is None else {"prepend_bos": bos}
    for text in (PROMPT, [PROMPT, "When John", "naïve — 3.5€"], ["<|endoftext|> John", "John"]):
        mine = model.to_tokens(text, padding_side=side, **default)
        theirs = lens.to_tokens(text, padding_side=side, **default)
        assert torch.equal(mine, theirs)
        assert model.to_string(mine) == lens.to_string(theirs)
        assert model.to_str_tokens(text, **default) == lens.to_str_tokens(text, **default)
        lens.tokenizer.padding_side = side
        theirs_mask = get_attention_mask(lens.tokenizer, theirs, bos is not False)
        lens.tokenizer.padding_side = "right"
        mask = model.runner.text.tokens_and_mask(mine, bos, side, followed=True)[1]
        assert torch.equal(torch.ones_like(mine) if mask is None else torch.from_numpy(mask), theirs_mask)


def test_single_tokens_and_positions(model: HookedTransformer, lens: Any) -> None:
    assert model.to_single_token(" John") == lens.to_single_token(" John")
    token = lens.to_single_token(" John")
    assert model.to_single_str_token(token) == lens.to_single_str_token(token)
    for mode in ("first", "last"):
        for what in (" John", token, torch.tensor(token)):
            for where in (PROMPT, lens.to_tokens(PROMPT), lens.to_tokens(PROMPT)[0]):
                assert model.get_token_position(what, where, mode) == lens.get_token_position(what, where, mode)
    assert model.to_string(torch.tensor(token)) == lens.to_string(torch.tensor(token))


def test_truncation_inside_a_given_tokenizer_does_not_touch_prompts(lens: Any) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(graphlens.embedded_model(), padding_side="left")
    theirs.backend_tokenizer.enable_truncation(3)
    mine = HookedTransformer.from_onnx(FOLDER, "cpu", tokenizer=theirs)
    assert torch.equal(mine.to_tokens(PROMPT), lens.to_tokens(PROMPT))
    assert mine.tokenizer.padding_side == "left"


def test_test_prompt_prints_transformerlens_ranks(
    model: HookedTransformer, lens: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer in ("Mary", " Mary gave a", ["John", "Mary"]):
        lines = []
        for call in (
            lambda a=answer: prompt_test(PROMPT, a, lens, print_details=False),
            lambda a=answer: prompt_test(PROMPT, a, model, print_details=False),
            lambda a=answer: model.test_prompt(PROMPT, a, print_details=False),
            lambda a=answer: utils.test_prompt(PROMPT, a, model, print_details=False),
        ):
            call()
            lines.append(capsys.readouterr().out)
        assert lines[0] == lines[1] == lines[2] == lines[3]


# TransformerLens's functions on our model


@pytest.fixture(scope="module")
def caches(model: HookedTransformer, lens: Any) -> tuple[Any, Any]:
    tokens = model.to_tokens([PROMPT, OTHER])
    _, mine = model.run_with_cache(tokens)
    _, theirs = lens.run_with_cache(tokens)
    return transformer_lens.ActivationCache(dict(mine.items()), model), theirs


@pytest.mark.parametrize(
    "read",
    [
        lambda cache: cache.decompose_resid(apply_ln=True),
        lambda cache: cache.stack_head_results(incl_remainder=True, pos_slice=-1),
        lambda cache: cache.accumulated_resid(apply_ln=True, incl_mid=True),
        lambda cache: cache.stack_neuron_results(layer=2, pos_slice=-1),
        lambda cache: cache.get_full_resid_decomposition(expand_neurons=False, apply_ln=True),
        lambda cache: cache.logit_attrs(cache.decompose_resid(), " Mary", " John"),
        lambda cache: cache.logit_attrs(cache.stack_head_results(pos_slice=-1), torch.tensor([5, 6]), pos_slice=-1),
        lambda cache: cache.apply_ln_to_stack(cache.decompose_resid(), recompute_ln=True),
    ],
)  # fmt: skip
def test_transformerlens_cache_methods_on_our_activations(
    caches: tuple[Any, Any], read: Callable[[Any], torch.Tensor]
) -> None:
    close(read(caches[0]), read(caches[1]), tolerance=2e-4)


@pytest.mark.filterwarnings("ignore:.* tokens were cut from the end of the text")
def test_the_sanity_check_of_a_text_that_is_too_long(model: HookedTransformer, lens: Any) -> None:
    close(evals.sanity_check(model), evals.sanity_check(lens))


def test_evals(model: HookedTransformer, lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # induction_loss draws ids up to 20,000, and this model knows fewer.
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda low, high, size: randint(100, model.cfg.d_vocab, size))
    found = []
    for either in (model, lens):
        torch.manual_seed(0)
        found.append(evals.induction_loss(either, subseq_len=20, device="cpu"))
    close(*found)
    results = []
    for either in (model, lens):
        torch.manual_seed(0)
        data = evals.IOIDataset(either.tokenizer, num_samples=8, seed=0)
        results.append(evals.ioi_eval(either, data, batch_size=4))
    assert results[0]["Accuracy"] == results[1]["Accuracy"]
    np.testing.assert_allclose(results[0]["Logit Difference"], results[1]["Logit Difference"], rtol=1e-4)
