"""Gradients against torch autograd, in TransformerLens's HookedTransformer, at every hook point."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_oracle import oracle
from torch.nn.functional import cross_entropy

import graphlens
from graphlens import HookedTransformer, InputError
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Probability
from graphlens.torch import HookedTransformer as TorchTransformer

TOKENS = np.array([[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26], [43, 38, 32, 79, 50, 28]])
TOLERANCE = 1e-4  # of the largest gradient at a hook point


@pytest.fixture(scope="module")
def pair(odd_hooked: Path, odd_checkpoint: Path) -> tuple[HookedTransformer, Any]:
    return HookedTransformer.from_onnx(odd_hooked, "cpu"), oracle(odd_checkpoint)


def autograd(lens: Any, metric: Callable[[torch.Tensor], torch.Tensor], tokens: np.ndarray = TOKENS) -> dict[str, Any]:
    """The gradient of a metric at every hook point by torch.

    ln1 runs three times a block there, for queries, keys and values: its total gradient is the sum of their gradients.
    """
    found: dict[str, Any] = {}

    def add(gradient: torch.Tensor, hook: Any) -> None:
        found[hook.name] = found.get(hook.name, 0) + gradient.detach().numpy()

    lens.requires_grad_(True)
    with torch.enable_grad(), lens.hooks(bwd_hooks=[(lambda name: True, add)]):
        metric(lens(torch.from_numpy(tokens))).backward()
    lens.requires_grad_(False)
    return found


def assert_close(found: dict[str, Any], expected: dict[str, Any], least: int) -> None:
    assert len(found) >= least
    for name, gradient in found.items():
        scale = float(np.abs(expected[name]).max())
        assert gradient.shape == expected[name].shape, name
        assert scale > 0, f"the gradient at {name} is zero, so this tests nothing"
        assert float(np.abs(gradient - expected[name]).max()) <= TOLERANCE * scale, name


def reference_logits(pair: tuple[HookedTransformer, Any]) -> np.ndarray:
    return np.asarray(pair[0](TOKENS[::-1]))


METRICS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "logit difference": (lambda pair: LogitDiff(7, 60), lambda pair, x: (x[:, -1, 7] - x[:, -1, 60]).mean()),
    "normalised, at positions of its own": (
        lambda pair: LogitDiff([7, 8, 9], 60, position=[1, -1, 3]).normalised(3.0, 1.0),
        lambda pair, x: sum((x[i, p, t] - x[i, p, 60]) / 6 for i, (p, t) in enumerate([(1, 7), (5, 8), (3, 9)])),
    ),
    "probability": (lambda pair: Probability(7), lambda pair, x: x[:, -1].softmax(-1)[:, 7].mean()),
    "cross-entropy": (lambda pair: CrossEntropy([1, 2, 3], 2), lambda pair, x: cross_entropy(x[:, 2], torch.tensor([1, 2, 3]))),
    "next-token loss": (
        lambda pair: CrossEntropy(TOKENS, position=None),
        lambda pair, x: cross_entropy(x[:, :-1].flatten(0, 1), torch.from_numpy(TOKENS)[:, 1:].flatten()),
    ),
    "KL divergence": (
        lambda pair: KLDivergence(reference_logits(pair)),
        lambda pair, x: torch.nn.functional.kl_div(
            x[:, -1].log_softmax(-1), torch.tensor(reference_logits(pair))[:, -1].log_softmax(-1),
            reduction="batchmean", log_target=True,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_gradients_at_every_hook_point(pair: tuple[HookedTransformer, Any], name: str) -> None:
    ours, theirs = METRICS[name]
    found = pair[0].gradients(TOKENS, ours(pair))
    assert_close(found, autograd(pair[1], lambda logits: theirs(pair, logits)), 57)


def test_gradients_of_the_embedded_model(model: Any, lens: Any) -> None:
    numpy_face = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    tokens = np.asarray(model.to_tokens("When John and Mary went to the store, John gave a drink to"))
    mary, john = (numpy_face.to_single_token(name) for name in (" Mary", " John"))
    found = numpy_face.gradients(tokens, LogitDiff(" Mary", " John"))
    assert_close(found, autograd(lens, lambda x: x[0, -1, mary] - x[0, -1, john], tokens), 74)


@pytest.mark.parametrize("flags", [["use_attn_result", "use_hook_mlp_in", "use_split_qkv_input"], ["use_attn_in"]])
def test_gradients_at_flagged_hook_points(pair: tuple[HookedTransformer, Any], flags: list[str]) -> None:
    ours, theirs = pair
    try:
        for flag in flags:
            getattr(ours, f"set_{flag}")(True)
            getattr(theirs, f"set_{flag}")(True)
        wanted = ("result", "mlp_in", "q_input", "k_input", "v_input", "attn_in", "hook_z", "resid_pre")
        names = [name for name in ours.hook_dict if name.endswith(wanted)]
        found = ours.gradients(TOKENS, LogitDiff(7, 60), names)
        assert_close(found, autograd(theirs, lambda x: METRICS["logit difference"][1](pair, x)), 9)
    finally:
        for flag in flags:
            getattr(ours, f"set_{flag}")(False)
            getattr(theirs, f"set_{flag}")(False)


def test_run_with_cache_with_its_gradients(pair: tuple[HookedTransformer, Any]) -> None:
    ours, theirs = pair
    loss, cache = ours.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    expected = autograd(theirs, lambda x: METRICS["next-token loss"][1](pair, x))
    assert_close({k.removesuffix("_grad"): v for k, v in cache.items() if k.endswith("_grad")}, expected, 57)
    assert float(loss) == pytest.approx(float(ours(TOKENS, return_type="loss")), rel=1e-6)
    theirs.requires_grad_(True)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, other = theirs.run_with_cache(torch.from_numpy(TOKENS), return_type="loss", incl_bwd=True)
    theirs.requires_grad_(False)
    assert set(cache) == set(other.keys())
    names = ["blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post"]
    _, some = ours.run_with_cache(TOKENS, names_filter=names, return_type="loss", incl_bwd=True)
    assert list(some) == [*names, *(f"{name}_grad" for name in reversed(names))]


@pytest.mark.parametrize("face", ["numpy", "torch"])
@pytest.mark.parametrize("replaces", [False, True])
def test_backward_hooks(pair: tuple[HookedTransformer, Any], odd_hooked: Path, face: str, replaces: bool) -> None:
    """Called with the same gradients, in the same order; what one returns is what earlier layers get."""
    names = ["blocks.2.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre", "hook_embed"]

    def run(either: Any, tokens: Any, tensors: bool) -> list[tuple[str, np.ndarray]]:
        seen: list[tuple[str, np.ndarray]] = []

        def hook(gradient: Any, hook: Any) -> Any:
            seen.append((hook.name, gradient.detach().numpy().copy() if tensors else gradient.copy()))
            # TransformerLens hands torch what the hook returns, which must be a tuple.
            return (gradient * 0.5,) if replaces and hook.name == "blocks.2.hook_resid_mid" else None

        with torch.enable_grad(), either.hooks(bwd_hooks=[(name, hook) for name in names]):
            loss = either(tokens, return_type="loss")
            if tensors:
                loss.backward()
        return seen

    theirs = pair[1].requires_grad_(True)
    expected = run(theirs, torch.from_numpy(TOKENS), True)
    theirs.requires_grad_(False)
    if face == "numpy":
        found = run(pair[0], TOKENS, False)
    else:
        found = run(TorchTransformer.from_onnx(odd_hooked, "cpu"), torch.from_numpy(TOKENS), True)
    assert [name for name, _ in found] == [name for name, _ in expected] == names
    for (name, ours), (_, other) in zip(found, expected, strict=True):
        assert float(np.abs(ours - other).max()) <= TOLERANCE * float(np.abs(other).max()), name


def test_the_usual_torch_script(odd_hooked: Path, pair: tuple[HookedTransformer, Any]) -> None:
    """metric(model(tokens)).backward() with any torch metric, and interventions that stand."""
    model = TorchTransformer.from_onnx(odd_hooked, "cpu")
    seen: dict[str, torch.Tensor] = {}

    def keep(gradient: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = gradient.clone()

    with torch.enable_grad(), model.hooks(bwd_hooks=[(lambda name: name.endswith("hook_resid_pre"), keep)]):
        logits = model(torch.from_numpy(TOKENS))
        (logits[:, -1].softmax(-1)[:, 7] ** 2).sum().backward()
        assert not model(torch.from_numpy(TOKENS), stop_at_layer=1).requires_grad
    expected = autograd(pair[1], lambda x: (x[:, -1].softmax(-1)[:, 7] ** 2).sum())
    assert_close({name: value.numpy() for name, value in seen.items()}, expected, 3)
    with torch.enable_grad():
        assert not model(torch.from_numpy(TOKENS)).requires_grad
    with torch.no_grad(), model.hooks(bwd_hooks=[("hook_embed", keep)]):
        assert not model(torch.from_numpy(TOKENS)).requires_grad


def test_a_padded_loss(pair: tuple[HookedTransformer, Any]) -> None:
    mask = np.ones_like(TOKENS)
    mask[1, :2] = 0
    loss, cache = pair[0].run_with_cache(TOKENS, return_type="loss", attention_mask=mask, incl_bwd=True)
    theirs = pair[1].requires_grad_(True)
    gradient: list[np.ndarray] = []
    hook = ("blocks.1.hook_resid_mid", lambda value, hook: gradient.append(value.numpy().copy()))
    with torch.enable_grad(), theirs.hooks(bwd_hooks=[hook]):
        losses = theirs(
            torch.from_numpy(TOKENS), return_type="loss", attention_mask=torch.from_numpy(mask), loss_per_token=True
        )
        counted = torch.from_numpy(mask[:, :-1] * mask[:, 1:])
        total = (losses * counted).sum() / counted.sum()
        total.backward()
    theirs.requires_grad_(False)
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-5)
    ours = cache["blocks.1.hook_resid_mid_grad"]
    assert float(np.abs(ours - gradient[0]).max()) <= TOLERANCE * float(np.abs(gradient[0]).max())


def test_finite_differences_in_float64(odd_checkpoint: Path) -> None:
    """Central differences through Steer, in directions of no particular kind."""
    from graphlens import Steer

    model = HookedTransformer.from_pretrained_no_processing(str(odd_checkpoint), dtype="float64")
    metric = CrossEntropy([1, 2, 3], 2)
    gradients = model.gradients(TOKENS, metric)
    draw = np.random.default_rng(0)
    tested = 0
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float64
        if name.endswith(("hook_attn_scores", "unembed.hook_out")):  # masked entries are -inf; metric's own input
            continue
        direction = draw.standard_normal(gradient.shape)
        ends = [
            float(metric(model.run_with_interventions(TOKENS, Steer(name, direction, size)))) for size in (1e-5, -1e-5)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8), name
        tested += 1
    assert tested >= 50


def test_bad_input(pair: tuple[HookedTransformer, Any]) -> None:
    model = pair[0]
    with pytest.raises(InputError, match="has no derivative"):
        model.gradients(TOKENS, lambda logits: logits.sum())
    with pytest.raises(InputError, match="scalar"):
        model.run_with_cache(TOKENS, incl_bwd=True)
    with pytest.raises(InputError, match="scalar"):
        model.run_with_cache(TOKENS, return_type="loss", loss_per_token=True, incl_bwd=True)


def test_float64_takes_every_kind_of_seed(odd_checkpoint: Path) -> None:
    """ONNX Runtime has no OneHot of float64 values."""
    model = HookedTransformer.from_pretrained_no_processing(str(odd_checkpoint), dtype="float64")
    lens = oracle(odd_checkpoint, dtype=torch.float64)
    loss = autograd(lens, lambda x: cross_entropy(x[:, :-1].flatten(0, 1), torch.from_numpy(TOKENS)[:, 1:].flatten()))
    _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    for name, expected in loss.items():
        found = cache[f"{name}_grad"]
        assert float(np.abs(found - expected).max()) <= 1e-9 * float(np.abs(expected).max()), name
    difference = autograd(lens, lambda x: (x[:, -1, 7] - x[:, -1, 60]).mean())
    for name, found in model.gradients(TOKENS, LogitDiff(7, 60)).items():
        assert float(np.abs(found - difference[name]).max()) <= 1e-9 * float(np.abs(difference[name]).max()), name


def test_backward_remembers_what_stood_in_the_forward(odd_hooked: Path) -> None:
    """Interventions that have ended by then, and tokens that have been written over since."""
    from graphlens import Ablate

    model = TorchTransformer.from_onnx(odd_hooked, "cpu")
    edit, name, seen = Ablate("blocks.1.hook_mlp_out"), "blocks.0.hook_resid_mid", dict[str, torch.Tensor]()
    model.add_hook(name, lambda gradient, hook: seen.__setitem__(hook.name, gradient.clone()), dir="bwd")
    tokens = torch.from_numpy(TOKENS.copy())
    with torch.enable_grad():
        logits = model.run_with_interventions(tokens, edit)
        tokens[:] = 0
        (logits[:, -1, 7] - logits[:, -1, 60]).mean().backward()
    plain = HookedTransformer.from_onnx(odd_hooked, "cpu")
    with plain.intervene(edit):
        expected = plain.gradients(TOKENS, LogitDiff(7, 60), [name])[name]
    assert float(np.abs(seen[name].numpy() - expected).max()) <= 1e-5 * float(np.abs(expected).max())
    cache = graphlens.KeyValueCache.init_cache(plain.cfg, batch_size=len(TOKENS))
    with torch.enable_grad(), pytest.raises(InputError, match="KV cache"):
        model(torch.from_numpy(TOKENS), past_kv_cache=cache)
