"""The analysis methods by what must be equal: parts and wholes, factored and dense, projected and not."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import utils
from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.errors import GraphlensError, InputError, UnknownHookPoint
from graphlens.utils import Slice
from tests.closeness import close

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def run(tiny: graphlens.HookedTransformer, tokens: Any) -> tuple[Any, ActivationCache]:
    logits, cache = tiny.run_with_cache(tokens)
    return logits, cache


@pytest.fixture(scope="module")
def cache(run: tuple[Any, ActivationCache]) -> ActivationCache:
    return run[1]


@pytest.fixture(scope="module")
def single(tiny: graphlens.HookedTransformer, tokens: Any) -> ActivationCache:
    return tiny.run_with_cache(tokens[:1])[1].remove_batch_dim()


def weight(model: Any, name: str) -> Any:
    return model.weights[name]


# The residual stream

LAYERS = [(0, False), (2, False), (2, True), (3, True), (None, False)]
SLICES = [None, 2, -1, (1, 4), (None, None, 2), [0, 3], Slice(-2), np.array([5, 1])]


def residual(cache: ActivationCache, layer: int | None, mlp_input: bool) -> Any:
    if layer is None:
        return cache["resid_post", -1]
    return cache["resid_mid" if mlp_input else "resid_pre", layer]


@pytest.mark.parametrize("pos_slice", SLICES, ids=str)
@pytest.mark.parametrize(("layer", "mlp_input"), LAYERS)
def test_decompositions_sum_to_the_residual(
    cache: Any, single: Any, layer: Any, mlp_input: bool, pos_slice: Any
) -> None:
    for kept in (cache, single):
        expected = Slice(pos_slice).apply(residual(kept, layer, mlp_input), dim=-2)
        accumulated = kept.accumulated_resid(layer, incl_mid=True, mlp_input=mlp_input, pos_slice=pos_slice)
        np.testing.assert_array_equal(accumulated[-1], expected)
        close(kept.decompose_resid(layer, mlp_input, pos_slice=pos_slice).sum(0), expected)
        for expand in (True, False):
            stack, labels = kept.get_full_resid_decomposition(
                layer, mlp_input, expand, pos_slice=pos_slice, return_labels=True
            )
            close(stack.sum(0), expected)
            assert len(stack) == len(labels) == len(set(labels))


@pytest.mark.parametrize(("layer", "mlp_input"), LAYERS)
def test_apply_ln_of_the_parts_sums_to_the_cached_normalised_residual(cache: Any, layer: Any, mlp_input: bool) -> None:
    norm = "ln_final" if layer is None else f"blocks.{layer}.ln{2 if mlp_input else 1}"
    expected = cache[f"{norm}.hook_normalized"]
    close(cache.decompose_resid(layer, mlp_input, apply_ln=True).sum(0), expected)
    for expand in (True, False):
        close(cache.get_full_resid_decomposition(layer, mlp_input, expand, apply_ln=True).sum(0), expected)
    if not mlp_input:
        close(cache.stack_head_results(layer, incl_remainder=True, apply_ln=True).sum(0), expected)
        close(cache.stack_neuron_results(layer, incl_remainder=True, apply_ln=True).sum(0), expected)


def test_labels_and_remainders(tiny: Any, cache: Any) -> None:
    cfg, names = tiny.cfg, set(cache)
    heads, labels = cache.stack_head_results(2, return_labels=True, incl_remainder=True)
    assert labels == [*(f"L{i}H{h}" for i in range(2) for h in range(cfg.n_heads)), "remainder"]
    close(heads.sum(0), cache["resid_post", 1])
    neurons, labels = cache.stack_neuron_results(1, neuron_slice=[3, 500], return_labels=True, incl_remainder=True)
    assert labels == ["L0N3", "L0N500", "remainder"]
    close(neurons.sum(0), cache["resid_post", 0])
    assert cache.stack_neuron_results(2, neuron_slice=7, return_labels=True)[1] == ["L0N7", "L1N7"]
    _, labels = cache.accumulated_resid(return_labels=True, incl_mid=True)
    assert labels == [*(f"{i}_{kind}" for i in range(cfg.n_layers) for kind in ("pre", "mid")), "final_post"]
    _, labels = cache.decompose_resid(1, mlp_input=True, mode="attn", return_labels=True)
    assert labels == ["embed", "pos_embed", "0_attn_out", "1_attn_out"]
    _, labels = cache.get_full_resid_decomposition(1, expand_neurons=False, return_labels=True)
    assert labels == [*(f"L0H{h}" for h in range(cfg.n_heads)), "0_mlp_out", "embed", "pos_embed", "bias"]
    assert set(cache) == names, "no method but compute_head_results may add to a cache"


def test_at_layer_0_nothing_is_written_and_the_remainder_is_the_embeddings(cache: Any) -> None:
    shape = cache["hook_embed"].shape
    for stack in (cache.stack_head_results(0), cache.stack_neuron_results(0), cache.decompose_resid(0, mode="mlp")[2:]):
        assert stack.shape == (0, *shape)
    assert cache.stack_neuron_results(0, project_output_onto=np.ones(shape[-1], np.float32)).shape == (0, *shape[:-1])
    assert cache.decompose_resid(0, incl_embeds=False).shape == (0, *shape)
    for stack in (cache.stack_head_results, cache.stack_neuron_results):
        np.testing.assert_array_equal(stack(0, incl_remainder=True), cache["resid_pre", 0][None])


def test_head_results_are_z_times_w_o_and_sum_to_the_attention_output(tiny: Any, tokens: Any) -> None:
    _, cache = tiny.run_with_cache(tokens)
    before = cache.stack_head_results(pos_slice=(1, 3))
    cache.compute_head_results()
    for layer in range(tiny.cfg.n_layers):
        results = cache["result", layer]
        weights = weight(tiny, f"blocks.{layer}.attn.W_O")
        close(results, np.einsum("bphd,hdm->bphm", cache["z", layer], weights))
        close(results.sum(-2) + weight(tiny, f"blocks.{layer}.attn.b_O"), cache["attn_out", layer])
    close(cache.stack_head_results(pos_slice=(1, 3)), before)
    # An edited result is what counts: that is what use_attn_result's hooks are for.
    cache.cache_dict["blocks.0.attn.hook_result"] = cache["result", 0] * 0
    assert not cache.stack_head_results(1).any()
    cache.compute_head_results()
    assert not cache["result", 0].any()


@pytest.mark.parametrize("pos_slice", [None, -1, [0, 3]], ids=str)
@pytest.mark.parametrize("apply_ln", [False, True])
def test_projections_are_the_unprojected_stacks_times_the_direction(
    cache: Any, single: Any, apply_ln: bool, pos_slice: Any
) -> None:
    draw = np.random.default_rng(1)
    for kept in (cache, single):
        for onto in (draw.normal(size=128).astype(np.float32), draw.normal(size=(128, 3)).astype(np.float32)):
            for neurons in (None, (5, 50), [7, 9], 11):
                options = {"pos_slice": pos_slice, "neuron_slice": neurons, "apply_ln": apply_ln}
                full = kept.stack_neuron_results(2, incl_remainder=True, **options)
                projected = kept.stack_neuron_results(2, incl_remainder=True, project_output_onto=onto, **options)
                close(projected, full @ onto)
            for mlp_input in (False, True):
                options = {"pos_slice": pos_slice, "apply_ln": apply_ln, "mlp_input": mlp_input}
                for expand in (True, False):
                    full = kept.get_full_resid_decomposition(1, expand_neurons=expand, **options)
                    projected = kept.get_full_resid_decomposition(
                        1, expand_neurons=expand, project_output_onto=onto, **options
                    )
                    close(projected, full @ onto)
            for neurons in (None, (5, 50), [7, 9], 11):
                full = kept.get_neuron_results(-1, neurons, pos_slice)
                close(kept.get_neuron_results(-1, neurons, pos_slice, onto), full @ onto)


def test_a_projection_never_builds_what_it_projects(cache: Any) -> None:
    onto = np.ones(128, np.float32)
    expanded = cache.get_full_resid_decomposition().nbytes
    for method in (cache.stack_neuron_results, cache.get_full_resid_decomposition):
        tracemalloc.start()
        method(-1, apply_ln=True, project_output_onto=onto)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < expanded / 8


def test_stack_activation_stacks_what_the_cache_holds(cache: Any) -> None:
    patterns = cache.stack_activation("pattern")
    np.testing.assert_array_equal(patterns, np.stack([cache["pattern", i] for i in range(4)]))
    assert cache.stack_activation("normalized", 2, "ln2").shape[0] == 2
    with pytest.raises(InputError, match="before layer 0"):
        cache.stack_activation("z", 0)


# Logits


def test_the_last_lens_is_the_models_logits(tiny: Any, run: Any) -> None:
    logits, cache = run
    lens, labels = cache.logit_lens(incl_mid=True, return_labels=True)
    assert lens.shape == (2 * tiny.cfg.n_layers + 1, *logits.shape)
    assert labels[-2:] == ["3_mid", "final_post"]
    close(lens[-1], logits)
    close(lens[3], tiny.unembed(tiny.ln_final(cache["resid_mid", 1])))
    close(cache.logit_lens(pos_slice=-1)[-1], logits[:, -1])
    close(cache.accumulated_resid(apply_ln=True)[-1], cache["unembed.hook_in"])


@pytest.mark.parametrize("pos_slice", [None, -1], ids=str)
def test_logit_attributions_sum_to_the_logit_difference(tiny: Any, run: Any, pos_slice: Any) -> None:
    logits, cache = run
    draw = np.random.default_rng(2)
    right, wrong = draw.integers(0, tiny.cfg.d_vocab, (2, 2, 6))
    right, wrong = (right, wrong) if pos_slice is None else (right[:, -1], wrong[:, -1])
    # The final norm's weights are not folded: fold them into the unembedding, and its bias into a constant.
    w, b, unembedding = (weight(tiny, name) for name in ("ln_final.w", "ln_final.b", "unembed.W_U"))
    folded = with_weights(tiny, {"unembed.W_U": w[:, None] * unembedding})
    kept = ActivationCache(cache.cache_dict, folded)
    stack = kept.get_full_resid_decomposition(pos_slice=pos_slice, expand_neurons=False)
    scores = logits if pos_slice is None else logits[:, -1]
    constant = b @ unembedding
    picked = np.take_along_axis(scores, right[..., None], -1)[..., 0]
    other = np.take_along_axis(scores, wrong[..., None], -1)[..., 0]
    close(kept.logit_attrs(stack, right, pos_slice=pos_slice).sum(0) + constant[right], picked)
    difference = kept.logit_attrs(stack, right, wrong, pos_slice=pos_slice).sum(0)
    close(difference + constant[right] - constant[wrong], picked - other)


def with_weights(model: Any, weights: dict[str, Any]) -> Any:
    """The model with other weights, to the methods that read them."""
    engine = copy.copy(model.runner.engine)
    engine.weights = {**model.weights, **weights}
    return type(model)(engine, model.tokenizer)


def test_tokens_of_logit_attrs(tiny: Any, cache: Any) -> None:
    stack = cache.decompose_resid()
    last = cache.decompose_resid(pos_slice=-1)
    one = cache.logit_attrs(stack, 5)
    assert one.shape == (10, 2, 6)
    for same in (np.int64(5), [5], np.full((2, 6), 5), np.full(6, 5), [[5], [5]]):
        close(cache.logit_attrs(stack, same), one)
    close(cache.logit_attrs(stack, [5, 7])[:, 1], cache.logit_attrs(stack, 7)[:, 1])
    close(cache.logit_attrs(last, [5, 7], pos_slice=-1)[:, 1], cache.logit_attrs(stack, 7)[:, 1, -1])
    close(cache.logit_attrs(stack, 5, batch_slice=1), one[:, 1])
    close(cache.logit_attrs(stack, 5, batch_slice=[1]), one[:, 1:])
    close(cache.logit_attrs(stack[:, 1], 5, batch_slice=1, has_batch_dim=False), one[:, 1])
    text = " the"
    close(cache.logit_attrs(stack, text), cache.logit_attrs(stack, tiny.to_single_token(text)))
    close(cache.logit_attrs(stack, [text, text]), cache.logit_attrs(stack, text))
    with pytest.raises(InputError, match="not one"):
        cache.logit_attrs(stack, " the store")
    with pytest.raises(InputError, match=f"0 to {tiny.cfg.d_vocab - 1}"):
        cache.logit_attrs(stack, tiny.cfg.d_vocab)
    with pytest.raises(InputError, match=f"0 to {tiny.cfg.d_vocab - 1}"):
        cache.logit_attrs(stack, -1)
    with pytest.raises(InputError, match="same shape"):
        cache.logit_attrs(stack, 5, [5, 7])
    with pytest.raises(InputError, match=r"\[3\]"):
        cache.logit_attrs(stack, [5, 7, 9])
    with pytest.raises(InputError, match=r"\[2, 1\]"):
        cache.logit_attrs(stack[:, :, :2], [5, 7], pos_slice=(0, 2))


# Copies


def pickled(value: Any) -> Any:
    """What comes back of a value that is stored."""
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("kind", ["cache", "single"])
def test_a_copy_of_a_cache_holds_and_computes_the_same(request: Any, kind: str, copied: Any) -> None:
    cache = request.getfixturevalue(kind)
    other = copied(cache)
    assert type(other) is ActivationCache
    assert list(other) == list(cache)
    assert other.has_batch_dim == cache.has_batch_dim
    for name, value in cache.items():
        assert other[name].dtype == value.dtype
        np.testing.assert_array_equal(other[name], value)
    np.testing.assert_array_equal(other.stack_head_results(apply_ln=True), cache.stack_head_results(apply_ln=True))
    np.testing.assert_array_equal(
        other.logit_attrs(other.decompose_resid(), " the"), cache.logit_attrs(cache.decompose_resid(), " the")
    )


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_a_deep_copy_of_a_cache_has_activations_of_its_own(tiny: Any, tokens: Any, copied: Any) -> None:
    _, cache = tiny.run_with_cache(tokens)
    other = copied(cache)
    other["hook_embed"][:] = 0
    other.compute_head_results()
    assert cache["hook_embed"].any()
    assert "blocks.0.attn.hook_result" not in cache
    assert (other.model is tiny) == (copied is copy.deepcopy)


# What does not fit


def test_a_missing_activation_is_named(tiny: Any, tokens: Any) -> None:
    _, cache = tiny.run_with_cache(tokens, names_filter=lambda name: "resid" in name)
    for method, name in (
        (cache.decompose_resid, "hook_embed"),
        (cache.compute_head_results, "blocks.0.attn.hook_z"),
        (cache.stack_head_results, "blocks.0.attn.hook_z"),
        (lambda: cache.stack_neuron_results(-1), "blocks.0.mlp.hook_post"),
        (lambda: cache.decompose_resid(2, incl_embeds=False), "blocks.0.hook_attn_out"),
        (lambda: cache.apply_ln_to_stack(cache.accumulated_resid(1), 1), "blocks.1.ln1.hook_scale"),
        (lambda: cache.logit_attrs(cache.accumulated_resid(), 3), "ln_final.hook_scale"),
    ):
        with pytest.raises(UnknownHookPoint, match=name):
            method()
    _, cache = tiny.run_with_cache(tokens, names_filter=lambda name: name != "hook_pos_embed")
    assert cache.has_embed
    assert not cache.has_pos_embed
    with pytest.raises(UnknownHookPoint, match="hook_pos_embed"):
        cache.get_full_resid_decomposition()


@pytest.mark.parametrize("layer", [5, -2, "1", 1.5, True])
def test_a_layer_that_does_not_exist_is_refused(cache: Any, layer: Any) -> None:
    for method in (
        cache.accumulated_resid,
        cache.decompose_resid,
        cache.stack_head_results,
        cache.stack_neuron_results,
        cache.get_full_resid_decomposition,
        cache.logit_lens,
        lambda value: cache.stack_activation("z", value),
        lambda value: cache.apply_ln_to_stack(cache.accumulated_resid(), value),
    ):
        with pytest.raises(InputError, match="layer"):
            method(layer)
    for wrong in (4, -5):
        with pytest.raises(InputError, match="4 layers"):
            cache.get_neuron_results(wrong)
    with pytest.raises(InputError, match="mlp_input"):
        cache.accumulated_resid(mlp_input=True)


def test_arguments_that_do_not_fit_are_refused(tiny: Any, cache: Any) -> None:
    stack = cache.accumulated_resid()
    cases = [
        lambda: cache.decompose_resid(mode="heads"),
        lambda: cache.decompose_resid(pos_slice=6),
        lambda: cache.decompose_resid(pos_slice="1"),
        lambda: cache.stack_neuron_results(1, neuron_slice=512),
        lambda: cache.stack_neuron_results(1, project_output_onto=np.ones(127)),
        lambda: cache.get_neuron_results(1, project_output_onto="up"),
        lambda: cache.apply_ln_to_stack(stack[..., :5]),
        lambda: cache.apply_ln_to_stack([1.0]),
        # Sliced or not, on one side only: NumPy alone would broadcast some of these.
        lambda: cache.apply_ln_to_stack(stack[:, :, :3], pos_slice=-1),
        lambda: cache.apply_ln_to_stack(stack[:, :, 0]),
        lambda: cache.apply_ln_to_stack(stack, pos_slice=[1]),
        lambda: cache.apply_ln_to_stack(stack[:, :1], batch_slice=1),
    ]
    for case in cases:
        with pytest.raises(InputError):
            case()
    _, square = tiny.run_with_cache(np.arange(4).reshape(2, 2))
    with pytest.raises(InputError, match="pos_slice"):
        square.apply_ln_to_stack(square.accumulated_resid(pos_slice=0))


# The container


def test_batch_slices_and_devices(tiny: Any, tokens: Any) -> None:
    _, cache = tiny.run_with_cache(tokens)
    assert list(cache.keys()) == list(cache) == [name for name, _ in cache.items()]
    assert len(list(cache.values())) == len(cache)
    second = cache.apply_slice_to_batch_dim(1)
    assert not second.has_batch_dim
    np.testing.assert_array_equal(cache["embed",], cache["hook_embed"])
    assert cache.has_batch_dim
    np.testing.assert_array_equal(second["z", 2], cache["z", 2][1])
    close(second.decompose_resid().sum(0), cache["resid_post", -1][1])
    close(second.logit_attrs(second.decompose_resid(), 3), cache.logit_attrs(cache.decompose_resid(), 3)[:, 1])
    assert cache.apply_slice_to_batch_dim((1,))["q", 0].shape[0] == 1
    assert second.apply_slice_to_batch_dim(None)["z", 2].shape == second["z", 2].shape
    with pytest.raises(InputError, match="no batch axis"):
        second.apply_slice_to_batch_dim(0)
    with pytest.raises(InputError, match="outside"):
        cache.apply_slice_to_batch_dim(2)
    with pytest.raises(InputError, match="holds 2"):
        cache.remove_batch_dim()
    assert cache.to("cpu") is cache
    with pytest.raises(InputError, match="cuda"):
        cache.to("cuda")


def test_slices() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    for given, expected in (
        (None, array),
        (1, array[:, 1]),
        ((2,), array[:, :2]),
        ((1, 3), array[:, 1:3]),
        ((0, 3, 2), array[:, 0:3:2]),
        ([2, 0], array[:, [2, 0]]),
        ([], array[:, :0]),
        (np.array([True, False, True]), array[:, [0, 2]]),
        (slice(1, None), array[:, 1:]),
        (Slice(2), array[:, 2]),
    ):
        np.testing.assert_array_equal(Slice(given).apply(array, dim=-2), expected)
    assert Slice.unwrap(2).apply(array, dim=1).shape == (2, 1, 4)
    assert Slice.unwrap((1, 2)).mode == "slice"
    assert Slice(3).indices().tolist() == [3]
    assert Slice((1, None, 2)).indices(6).tolist() == [1, 3, 5]
    for wrong in ("a", 1.5, True, [[1]], [0.5], (1, 2, 3, 4)):
        with pytest.raises(InputError):
            Slice(wrong)
    with pytest.raises(InputError, match="max_ctx"):
        Slice([1]).indices()


# Numerics


def test_losses_and_accuracy(tiny: Any, tokens: Any, run: Any) -> None:
    logits, _ = run
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities[:, :-1], tokens[:, 1:, None], -1)[..., 0])
    per_token = utils.lm_cross_entropy_loss(logits, tokens, per_token=True)
    close(per_token, expected.astype(np.float32))
    close(utils.lm_cross_entropy_loss(logits, tokens), np.float32(expected.mean()))
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    counted = [(0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3)]
    mean = np.mean([expected[at] for at in counted])
    close(utils.lm_cross_entropy_loss(logits, tokens, mask), np.float32(mean))
    masked = utils.lm_cross_entropy_loss(logits, tokens, mask, per_token=True)
    assert set(zip(*np.nonzero(masked), strict=True)) == set(counted)
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    np.testing.assert_array_equal(utils.lm_accuracy(logits, tokens, per_token=True), right)
    assert utils.lm_accuracy(logits, tokens) == right.mean(dtype=np.float32)
    for row in range(2):  # without the batch axis
        alone = utils.lm_cross_entropy_loss(logits[row], tokens[row], mask[row], per_token=True)
        np.testing.assert_array_equal(alone, masked[row])
        close(utils.lm_cross_entropy_loss(logits[row], tokens[row]), per_token[row].mean())
        np.testing.assert_array_equal(utils.lm_accuracy(logits[row], tokens[row], per_token=True), right[row])
        assert utils.lm_accuracy(logits[row], tokens[row]) == right[row].mean(dtype=np.float32)
    half = utils.lm_cross_entropy_loss(logits.astype(np.float16), tokens)
    assert half.dtype == np.float16
    assert abs(half - expected.mean()) < 1e-2 * expected.mean()
    for wrong in (
        lambda: utils.lm_cross_entropy_loss(logits, tokens[:, :5]),
        lambda: utils.lm_cross_entropy_loss(logits[0], tokens),
        lambda: utils.lm_cross_entropy_loss(logits[0], tokens[0], mask),
        lambda: utils.lm_cross_entropy_loss(logits[0, 0], tokens[0, 0]),
        lambda: utils.lm_cross_entropy_loss(logits, tokens + tiny.cfg.d_vocab),
        lambda: utils.lm_cross_entropy_loss(logits[:, :1], tokens[:, :1]),
        lambda: utils.lm_cross_entropy_loss(logits, tokens, mask[:1]),
        lambda: utils.lm_cross_entropy_loss(logits, tokens, mask * 0),
        lambda: utils.lm_accuracy(logits, tokens * 1.0),
    ):
        with pytest.raises(InputError):
            wrong()


def test_induction_loss(tiny: Any) -> None:
    loss = utils.induction_loss(tiny, batch_size=2, subseq_len=10)
    tokens = np.random.default_rng(0).integers(0, tiny.cfg.d_vocab, (2, 10))
    tokens = np.concatenate([tokens, tokens], 1)
    tokens[:, 0] = tiny.tokenizer.bos_token_id
    close(loss, utils.lm_cross_entropy_loss(tiny(tokens), tokens, per_token=True)[:, 11:].mean())
    assert loss == utils.induction_loss(tiny, batch_size=2, subseq_len=10)
    assert loss != utils.induction_loss(tiny, batch_size=2, subseq_len=10, prepend_bos=False)
    assert loss != utils.induction_loss(tiny, batch_size=2, subseq_len=10, seed=1)
    for wrong in ({"subseq_len": 65}, {"subseq_len": 2}, {"batch_size": 0}):
        with pytest.raises(InputError):
            utils.induction_loss(tiny, **wrong)


# Heads


def test_detect_head_measures_attention_on_a_pattern(tiny: Any) -> None:
    _, cache = tiny.run_with_cache(PROMPT)
    patterns = cache.stack_activation("pattern")[:, 0]
    ids = tiny.to_tokens(PROMPT)[0]
    size = len(ids)
    expected = {
        "previous_token_head": np.eye(size, k=-1),
        "duplicate_token_head": np.array(
            [[float(j < i and ids[i] == ids[j]) for j in range(size)] for i in range(size)]
        ),
        "induction_head": np.array(
            [[float(0 < j <= i and ids[i] == ids[j - 1] and j - 1 < i) for j in range(size)] for i in range(size)]
        ),
    }
    for name, pattern in expected.items():
        share = ((patterns * pattern).sum((-1, -2)) / size).astype(np.float32)
        close(utils.detect_head(tiny, PROMPT, name), share)
        close(utils.detect_head(tiny, PROMPT, pattern), share)
        close(utils.detect_head(tiny, PROMPT, name, cache=cache), share)
        near = utils.detect_head(tiny, PROMPT, name, error_measure="abs")
        close(near, (1 - np.abs(patterns - pattern).mean((-1, -2)) * size).astype(np.float32), 6e-4)
        found = utils.detect_head(tiny, [PROMPT, PROMPT], name, heads=[(1, 2), (3, 0)], exclude_bos=True)
        kept = patterns[1, 2].copy()
        kept[:, 0] = 0
        assert abs(found[1, 2] - (kept * pattern).sum() / kept.sum()) < 1e-5
        assert (np.delete(found.ravel(), [6, 12]) == -1).all()
        close(utils.detect_head(tiny, [PROMPT], name, heads={1: [2], 3: [0]}, exclude_bos=True), found)
    assert (utils.detect_head(tiny, PROMPT, "induction_head", heads=[]) == -1).all()
    np.testing.assert_allclose(cache["pattern", 1].sum(-1), 1, atol=1e-5)


def test_detect_head_refuses_what_does_not_fit(tiny: Any) -> None:
    _, cache = tiny.run_with_cache(PROMPT)
    for options in (
        {"detection_pattern": "copying_head"},
        {"detection_pattern": np.eye(3)},
        {"detection_pattern": np.ones((15, 15))},
        {"error_measure": "l2"},
        {"heads": [(4, 0)]},
        {"heads": {0: [-1]}},
        {"heads": [3]},
        {"seq": []},
        {"seq": 5},
        {"seq": [PROMPT], "cache": cache},
        {"seq": PROMPT + " the", "cache": cache},
        {"seq": " the" * 200},
    ):
        with pytest.raises(GraphlensError):
            utils.detect_head(tiny, **{"seq": PROMPT, "detection_pattern": "induction_head", **options})
    size = tiny.to_tokens(PROMPT).shape[1]
    with pytest.warns(UserWarning, match="zeros and ones"):
        utils.detect_head(tiny, PROMPT, np.eye(size) / 2)
