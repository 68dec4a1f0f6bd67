"""Every method of the activation cache, and the analysis helpers, against TransformerLens 3.9 on the same checkpoint."""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_oracle import PROCESSING, oracle

import graphlens
from graphlens import utils
from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.experiments.induction import repeated_tokens
from graphlens.torch import HookedTransformer as TorchTransformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformer_lens
    from transformer_lens import evals, head_detector
    from transformer_lens import utils as lens_utils

TOKENS = np.random.default_rng(0).integers(0, 101, (2, 7))
TOKENS.setflags(write=False)
PROMPT = "When John and Mary went to the store, John gave a drink to"
LAYERS, D_MODEL, D_MLP = 3, 40, 77
ONTO = torch.from_numpy(np.random.default_rng(1).normal(size=(D_MODEL, 2)).astype(np.float32))


def close(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        assert isinstance(found, tuple)
        assert len(found) == len(expected)
        assert list(found[1]) == list(expected[1])
        found, expected = found[0], expected[0]
    found, expected = (np.asarray(value) for value in (found, expected))
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    largest = float(np.abs(expected).max(initial=0))
    assert float(np.abs(found - expected).max(initial=0)) <= 5e-5 * max(1.0, largest)


@pytest.fixture(scope="module")
def lens(odd_checkpoint: Path) -> Any:
    return oracle(odd_checkpoint)


@pytest.fixture(scope="module")
def ours(odd_hooked: Path) -> graphlens.HookedTransformer:
    return graphlens.HookedTransformer.from_onnx(odd_hooked, "cpu")


@pytest.fixture(scope="module", params=["batch", "no batch axis"])
def caches(request: pytest.FixtureRequest, lens: Any, ours: Any) -> tuple[Any, ActivationCache]:
    """The same run cached by both: (TransformerLens's, ours)."""
    tokens = TOKENS if request.param == "batch" else TOKENS[:1]
    theirs = lens.run_with_cache(torch.tensor(tokens))[1]
    mine = ours.run_with_cache(tokens)[1]
    if request.param == "no batch axis":
        theirs.remove_batch_dim()
        mine.remove_batch_dim()
    return theirs, mine


def both(caches: tuple[Any, Any], method: str, *args: Any, **options: Any) -> None:
    """Calls the method on both caches and compares; ours gets arrays where theirs gets tensors."""

    def plain(value: Any) -> Any:
        return value.numpy() if isinstance(value, torch.Tensor) else value

    theirs, mine = caches
    expected = getattr(theirs, method)(*args, **options)
    found = getattr(mine, method)(*map(plain, args), **{name: plain(value) for name, value in options.items()})
    close(found, expected)


POSITIONS = [None, -1, (1, 6, 2), [5, 0, 2]]
each_position = pytest.mark.parametrize("pos_slice", POSITIONS, ids=str)
each_layer = pytest.mark.parametrize("layer", [None, 0, 2])


def test_the_signatures_are_the_same() -> None:
    for name in (
        "accumulated_resid", "decompose_resid", "logit_attrs", "compute_head_results", "stack_head_results",
        "get_neuron_results", "stack_neuron_results", "stack_activation", "get_full_resid_decomposition",
        "apply_ln_to_stack", "remove_batch_dim", "apply_slice_to_batch_dim", "to", "keys", "values", "items", "toggle_autodiff",
    ):  # fmt: skip
        theirs = inspect.signature(getattr(transformer_lens.ActivationCache, name)).parameters.values()
        mine = inspect.signature(getattr(ActivationCache, name)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in mine] == [(p.name, p.default, p.kind) for p in theirs], name
    mine, theirs = (inspect.signature(f).parameters for f in (utils.detect_head, head_detector.detect_head))
    assert [(p.name, p.default, p.kind) for p in mine.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


def test_the_caches_hold_the_same(caches: Any) -> None:
    theirs, mine = caches
    assert list(mine.keys()) == list(theirs.keys())
    for name, value in mine.items():
        # Where attention is masked both have -inf, whose difference is none.
        close(np.nan_to_num(value, neginf=0), np.nan_to_num(theirs[name].numpy(), neginf=0))


@each_position
@each_layer
@pytest.mark.parametrize("apply_ln", [False, True])
def test_accumulated_and_decomposed(caches: Any, layer: Any, apply_ln: bool, pos_slice: Any) -> None:
    options = {"layer": layer, "apply_ln": apply_ln, "pos_slice": pos_slice, "return_labels": True}
    for mlp_input in (False, True) if layer is not None else (False,):
        both(caches, "accumulated_resid", mlp_input=mlp_input, **options)
        both(caches, "accumulated_resid", mlp_input=mlp_input, incl_mid=True, **options)
        for mode in ("all", "attn", "mlp"):
            both(caches, "decompose_resid", mlp_input=mlp_input, mode=mode, **options)
        if layer:
            both(caches, "decompose_resid", mlp_input=mlp_input, incl_embeds=False, **options)
        for expand in (True, False):
            both(caches, "get_full_resid_decomposition", mlp_input=mlp_input, expand_neurons=expand, **options)
            # Theirs reads the neurons through ln1 even where everything else is read through ln2.
            if apply_ln and mlp_input and expand and layer:
                continue
            for onto in (ONTO, ONTO[:, 1]):
                both(
                    caches, "get_full_resid_decomposition", mlp_input=mlp_input, expand_neurons=expand,
                    project_output_onto=onto, **options,
                )  # fmt: skip


@each_position
@each_layer
@pytest.mark.parametrize("apply_ln", [False, True])
def test_heads_and_neurons(caches: Any, layer: Any, apply_ln: bool, pos_slice: Any) -> None:
    options = {"layer": layer, "apply_ln": apply_ln, "pos_slice": pos_slice, "return_labels": True}
    # At layer 0 theirs takes the last layer's residual for the remainder.
    for remainder in (False, True) if layer != 0 else (False,):
        both(caches, "stack_head_results", incl_remainder=remainder, **options)
        for neurons in (None, (70, None), [3, 76, 0]):
            both(caches, "stack_neuron_results", incl_remainder=remainder, neuron_slice=neurons, **options)
            for onto in (ONTO, ONTO[:, 1]):
                both(
                    caches, "stack_neuron_results", incl_remainder=remainder, neuron_slice=neurons,
                    project_output_onto=onto, **options,
                )  # fmt: skip
    if layer is not None:
        for neurons in (None, (70, None), [3, 76, 0]):
            for onto in (None, ONTO, ONTO[:, 1]):
                both(caches, "get_neuron_results", layer, neurons, pos_slice, onto)
        both(caches, "get_neuron_results", layer, 5, pos_slice)


def test_minus_one_and_the_number_of_layers_mean_the_end(caches: Any) -> None:
    for layer in (-1, LAYERS):
        for method in ("accumulated_resid", "decompose_resid", "get_full_resid_decomposition"):
            both(caches, method, layer=layer, apply_ln=True, return_labels=True)
        for method in ("stack_head_results", "stack_neuron_results"):
            both(caches, method, layer=layer, apply_ln=True, return_labels=True)
    both(caches, "get_neuron_results", -1)


def test_head_results_and_stacked_activations(lens: Any, ours: Any) -> None:
    theirs, mine = lens.run_with_cache(torch.tensor(TOKENS))[1], ours.run_with_cache(TOKENS)[1]
    assert theirs.compute_head_results() is None
    assert mine.compute_head_results() is None
    assert list(mine) == list(theirs)
    for layer in range(LAYERS):
        close(mine["result", layer], theirs["result", layer])
    for args in (("result",), ("z", 2), ("scale", 2, "ln2"), ("resid_post", None), ("q", -1, "attn")):
        both((theirs, mine), "stack_activation", *args)


@each_position
def test_logit_attributions(caches: Any, pos_slice: Any) -> None:
    theirs = caches[0]
    stack = theirs.decompose_resid(pos_slice=pos_slice)
    shape = stack.shape[1:-1]
    batched = theirs.has_batch_dim
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, 101, (2, *shape)))
    for tokens, wrong in ((17, None), (17, 3), (torch.tensor(17), torch.tensor(3)), (ids[0], None), (ids[0], ids[1])):
        both(caches, "logit_attrs", stack, tokens, wrong, pos_slice, has_batch_dim=batched)
    if batched and shape[0] == 2:
        for batch_slice, at in ((1, 1), ((0, 1), slice(1)), ([1, 0], [1, 0])):
            tokens = ids[0][at]
            both(caches, "logit_attrs", stack, tokens, None, pos_slice, batch_slice)
            both(caches, "apply_ln_to_stack", stack, 1, True, pos_slice, batch_slice)
            sliced = stack[:, at]
            both(caches, "apply_ln_to_stack", sliced, 1, True, pos_slice, batch_slice, has_batch_dim=False)


@each_position
def test_apply_ln_to_stack(caches: Any, pos_slice: Any) -> None:
    stack = caches[0].accumulated_resid(pos_slice=pos_slice)
    batched = caches[0].has_batch_dim
    for layer in (None, -1, 3, 0, 2):
        both(caches, "apply_ln_to_stack", stack, layer, pos_slice=pos_slice, has_batch_dim=batched)
        both(caches, "apply_ln_to_stack", stack, layer, pos_slice=pos_slice, has_batch_dim=batched, recompute_ln=True)
    both(caches, "apply_ln_to_stack", stack, 2, True, pos_slice, has_batch_dim=batched)


@each_position
def test_logit_lens(lens: Any, caches: Any, pos_slice: Any) -> None:
    theirs, mine = caches
    for layer, incl_mid in ((None, False), (None, True), (2, True)):
        stack = theirs.accumulated_resid(layer, incl_mid=incl_mid, pos_slice=pos_slice)
        flat = lens.unembed(lens.ln_final(stack.reshape(1, -1, D_MODEL)))
        close(mine.logit_lens(layer, incl_mid, pos_slice), flat.reshape(*stack.shape[:-1], -1))


def test_batch_slices(lens: Any, ours: Any) -> None:
    theirs, mine = lens.run_with_cache(torch.tensor(TOKENS))[1], ours.run_with_cache(TOKENS)[1]
    for batch_slice in (1, (1,), [1, 0], None):
        expected, found = (cache.apply_slice_to_batch_dim(batch_slice) for cache in (theirs, mine))
        assert found.has_batch_dim == (expected.has_batch_dim and batch_slice != 1)
        close(found["z", 1], expected["z", 1])
        both((expected, found), "decompose_resid", apply_ln=True, return_labels=True)


# The torch face, and a processed checkpoint


def test_the_torch_face_takes_and_gives_tensors(lens: Any, odd_hooked: Path) -> None:
    tokens = torch.tensor(TOKENS)
    theirs, mine = (
        lens.run_with_cache(tokens)[1],
        TorchTransformer.from_onnx(odd_hooked, "cpu").run_with_cache(tokens)[1],
    )
    assert mine.to(torch.device("cpu")) is mine
    for method, args in (
        ("accumulated_resid", ()),
        ("decompose_resid", (2, True, "all", True)),
        ("stack_head_results", ()),
        ("stack_neuron_results", (2, -1, None, False, True, True, ONTO[:, 0])),
        ("get_full_resid_decomposition", ()),
        ("logit_attrs", (theirs.decompose_resid(), tokens, tokens.flip(1))),
        ("apply_ln_to_stack", (theirs.accumulated_resid(), 1)),
        ("get_neuron_results", (1, 3, torch.tensor([2, 4]))),
        ("stack_activation", ("pattern",)),
    ):
        found = getattr(mine, method)(*args)
        assert isinstance(found, torch.Tensor)
        close(found, getattr(theirs, method)(*args))
    mine.compute_head_results()
    assert isinstance(mine["result", 0], torch.Tensor)
    assert isinstance(mine.logit_lens(), torch.Tensor)


def with_weights_of(lens: Any, model: Any) -> Any:
    """The model with TransformerLens's processed weights, to the methods that read them."""
    engine = copy.copy(model.runner.engine)
    engine.weights = {name: value.numpy() for name, value in lens.state_dict().items()}
    return type(model)(engine, model.tokenizer)


@each_position
def test_on_processed_weights_the_parts_are_theirs_too(odd_checkpoint: Path, ours: Any, pos_slice: Any) -> None:
    processed = oracle(odd_checkpoint, **dict.fromkeys(PROCESSING, True))
    theirs = processed.run_with_cache(torch.tensor(TOKENS))[1]
    values = {name: value.numpy() for name, value in theirs.items()}
    caches = (theirs, ActivationCache(values, with_weights_of(processed, ours)))
    stack, labels = caches[0].get_full_resid_decomposition(pos_slice=pos_slice, return_labels=True)
    for apply_ln in (False, True):
        both(caches, "get_full_resid_decomposition", apply_ln=apply_ln, pos_slice=pos_slice, return_labels=True)
        both(caches, "accumulated_resid", apply_ln=apply_ln, pos_slice=pos_slice, return_labels=True)
    both(caches, "logit_attrs", stack, 3, 99, pos_slice)
    assert len(labels) == LAYERS * (5 + D_MLP) + 3


# Helpers


def test_losses_and_accuracy(lens: Any) -> None:
    tokens = torch.tensor(TOKENS)
    logits = lens(tokens)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    for options in ({}, {"attention_mask": mask}):
        for per_token in (False, True):
            expected = lens_utils.lm_cross_entropy_loss(logits, tokens, per_token=per_token, **options)
            found = utils.lm_cross_entropy_loss(logits, tokens, per_token=per_token, **options)
            assert isinstance(found, torch.Tensor)
            close(found, expected)
            close(utils.lm_cross_entropy_loss(logits.numpy(), TOKENS, per_token=per_token, **options), expected)
    for per_token in (False, True):
        expected = lens_utils.lm_cross_entropy_loss(logits[0], tokens[0], per_token=per_token)
        close(utils.lm_cross_entropy_loss(logits[0], tokens[0], per_token=per_token), expected)
    tokens[0, 2:] = logits[0, 1:-1].argmax(-1)  # some right, some wrong
    expected = lens_utils.lm_accuracy(logits, tokens, per_token=True)
    assert torch.equal(utils.lm_accuracy(logits, tokens, per_token=True), expected)
    assert 0 < expected.sum() < expected.numel()
    close(utils.lm_accuracy(logits, tokens), lens_utils.lm_accuracy(logits, tokens))


@pytest.mark.parametrize("prepend_bos", [None, False])
def test_induction_loss(monkeypatch: pytest.MonkeyPatch, tiny: Any, tiny_lens: Any, prepend_bos: Any) -> None:
    tokens = torch.from_numpy(repeated_tokens(tiny, 3, 20, prepend_bos=False, seed=4))
    with monkeypatch.context() as patched:
        patched.setattr(evals.torch, "randint", lambda *_: tokens[:, :20])
        expected = evals.induction_loss(tiny_lens, batch_size=3, subseq_len=20, prepend_bos=prepend_bos, device="cpu")
    close(utils.induction_loss(tiny, 3, 20, prepend_bos, seed=4), expected)


@pytest.fixture(scope="module")
def tiny_lens(tiny_folder: Path) -> Any:
    return oracle(tiny_folder, tokenizer=True)


def test_a_string_for_logit_attrs(tiny: Any, tiny_lens: Any) -> None:
    theirs, mine = tiny_lens.run_with_cache(PROMPT)[1], tiny.run_with_cache(PROMPT)[1]
    both((theirs, mine), "logit_attrs", theirs.decompose_resid(), " Mary", " John")


@pytest.mark.parametrize("error_measure", ["mul", "abs"])
def test_detect_head(tiny: Any, tiny_lens: Any, tiny_folder: Path, error_measure: str) -> None:
    size = tiny.to_tokens(PROMPT).shape[1]
    own = torch.tril(torch.ones(size, size))
    torch_tiny = TorchTransformer.from_onnx(tiny_folder, "cpu")
    for pattern in ("previous_token_head", "duplicate_token_head", "induction_head", own):
        for options in (
            {},
            {"exclude_bos": True},
            {"exclude_bos": True, "exclude_current_token": True, "heads": [(0, 1), (3, 2), (0, 0)]},
            {"heads": {2: [3, 0]}},
        ):
            expected = head_detector.detect_head(tiny_lens, PROMPT, pattern, error_measure=error_measure, **options)
            found = utils.detect_head(tiny, PROMPT, pattern, error_measure=error_measure, **options)
            # "abs" rounds to three decimals, on either side of a half.
            assert float(np.abs(found - expected.numpy()).max()) <= (1.1e-3 if error_measure == "abs" else 5e-5)
            assert found.dtype == np.float32
            found = utils.detect_head(torch_tiny, PROMPT, pattern, error_measure=error_measure, **options)
            assert isinstance(found, torch.Tensor)
    prompts = [PROMPT, "John and Mary and John and Mary and"]
    close(
        utils.detect_head(tiny, prompts, "induction_head", error_measure=error_measure),
        head_detector.detect_head(tiny_lens, prompts, "induction_head", error_measure=error_measure),
    )


def test_factored_matrices_and_composition_scores(lens: Any) -> None:
    def mine(matrix: Any) -> utils.FactoredMatrix:
        return utils.FactoredMatrix(matrix.A, matrix.B)

    for theirs in (lens.OV, lens.QK, lens.OV[1, 2]):
        found = mine(theirs)
        assert tuple(found.shape) == tuple(theirs.shape)
        for name in ("AB", "BA", "S"):
            close(getattr(found, name), getattr(theirs, name))
        close(found.norm(), theirs.norm())
        close(found.get_corner(), theirs.get_corner())
        # Singular vectors have no sign of their own, and eigenvalues no order.
        close(np.abs(found.U), theirs.U.abs())
        close(np.abs(found.V), theirs.V.abs())
        close(found.make_even().AB, theirs.make_even().AB)
        close(np.sort(np.abs(found.eigenvalues)), np.sort(theirs.eigenvalues.abs()))
    for index in (1, (1, 2), (1, 2, 3), (1, -1, 3, -1), (slice(2), 4), (0, slice(None), slice(5), slice(2, 9))):
        close(mine(lens.OV)[index].AB, lens.OV[index].AB)
    theirs = lens_utils.composition_scores(lens.OV, lens.QK)
    close(utils.composition_scores(mine(lens.OV), mine(lens.QK)), theirs)
    pair = (lens.OV[0], lens.OV[1])
    theirs = lens_utils.composition_scores(*pair, broadcast_dims=False)
    close(utils.composition_scores(*map(mine, pair), broadcast_dims=False), theirs)
    tensors = (graphlens.torch.FactoredMatrix(matrix.A, matrix.B) for matrix in pair)
    found = utils.composition_scores(*tensors, broadcast_dims=False)
    assert isinstance(found, torch.Tensor)
    close(found, theirs)
    for given in (None, 2, (3,), (1, 4), [2, 0], torch.tensor([1, 3])):
        close(utils.Slice(given).apply(lens.W_E, dim=1), lens_utils.Slice(given).apply(lens.W_E, dim=1))
        close(utils.Slice(given).indices(7), lens_utils.Slice(given).indices(7))
