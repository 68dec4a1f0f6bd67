"""Path patching against the definition: two runs of Python hooks that freeze what the definition freezes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from graphlens import HookedTransformer, InputError
from graphlens.metrics import LogitDiff
from graphlens.patching import Site, path_patch
from tests.models import MODEL

Array = npt.NDArray[Any]
METRIC = LogitDiff(5, 7, reduction="none")


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return MODEL


@pytest.fixture(scope="module")
def prompts() -> tuple[Array, Array]:
    draw = np.random.default_rng(3)
    return draw.integers(1, 800, (2, 7)), draw.integers(1, 800, (2, 7))


def reference(
    model: HookedTransformer,
    corrupted: Array,
    clean: Any,
    sender: Site,
    receivers: Sequence[Site] | None,
    mlps: str,
    mask: Array | None = None,
) -> Array:
    """The metric [b] by the definition, in runs with Python hooks."""
    _, base = model.run_with_cache(corrupted, attention_mask=mask)
    seen: dict[str, Array] = {}

    def frozen(activation: Array, hook: Any) -> Array:
        found = base[hook.name].copy()
        if hook.name == sender.hook:
            index: list[Any] = [slice(None)] * found.ndim
            if sender.position is not None:
                index[1] = sender.position
            if sender.head is not None:
                index[2] = sender.head
            found[tuple(index)] = clean[hook.name][tuple(index)]
        return found

    def look(activation: Array, hook: Any) -> None:
        seen[hook.name] = activation.copy()

    hooks: list[tuple[str, Callable[..., Any]]] = []
    for layer in range(model.cfg.n_layers):
        hooks.append((f"blocks.{layer}.attn.hook_z", frozen))
        name = f"blocks.{layer}.hook_mlp_out"
        if mlps == "frozen" or name == sender.hook:
            hooks.append((name, frozen))
    hooks += [(f"blocks.{layer}.attn.hook_{letter}", look) for layer in range(model.cfg.n_layers) for letter in "qkv"]
    logits = model.run_with_hooks(corrupted, fwd_hooks=hooks, attention_mask=mask)
    if receivers is None:
        return np.asarray(METRIC(logits))

    def patch(activation: Array, hook: Any) -> Array:
        for receiver in receivers:
            if receiver.hook == hook.name:
                activation[:, :, receiver.head] = seen[hook.name][:, :, receiver.head]
        return activation

    names = {receiver.hook for receiver in receivers}
    patched = model.run_with_hooks(corrupted, fwd_hooks=[(n, patch) for n in names], attention_mask=mask)
    return np.asarray(METRIC(patched))


SENDERS = [
    Site("z", 0, head=2),
    Site("z", 1, head=0, position=3),
    Site("mlp_out", 0),
    Site("mlp_out", 2, position=6),
    Site("z", 3, head=1),
]
RECEIVERS: list[list[Site] | None] = [
    None,
    [Site("q", 2, head=1)],
    [Site("k", 1, head=3), Site("k", 3, head=0), Site("v", 3, head=0)],
]


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
@pytest.mark.parametrize("receivers", RECEIVERS, ids=["logits", "one query", "keys and a value"])
def test_path_patching_is_its_definition(
    model: HookedTransformer, prompts: tuple[Array, Array], receivers: list[Site] | None, mlps: str
) -> None:
    clean, corrupted = prompts
    _, cache = model.run_with_cache(clean)
    found = path_patch(model, corrupted, cache, METRIC, receivers or "logits", SENDERS, mlps=mlps)
    expected = np.stack([reference(model, corrupted, cache, s, receivers, mlps) for s in SENDERS])
    scale = float(np.abs(expected).max())
    assert found.axes == ("site", "batch")
    assert float(np.abs(found.values - expected).max()) <= 1e-5 * scale
    changed = np.abs(expected - np.asarray(METRIC(model(corrupted)))).max(1)
    assert changed.max() > 1e-4 * scale, "no sender changes anything, so this tests nothing"


def test_frozen_and_recomputed_mlps_differ(model: HookedTransformer, prompts: tuple[Array, Array]) -> None:
    clean, corrupted = prompts
    _, cache = model.run_with_cache(clean)
    one, other = (path_patch(model, corrupted, cache, METRIC, mlps=mlps).values for mlps in ("frozen", "recomputed"))
    assert one.shape == (4, 4, 2)
    assert float(np.abs(one - other)[:3].max()) > 1e-2
    # The last block's heads have one MLP after them all the same, but with it frozen only their own output counts.
    expected = reference(model, corrupted, cache, Site("z", 3, head=2), None, "frozen")
    np.testing.assert_allclose(one[3, 2], expected, atol=1e-5 * float(np.abs(one).max()))


def test_padded_prompts(model: HookedTransformer, prompts: tuple[Array, Array]) -> None:
    clean, corrupted = prompts
    mask = np.ones_like(corrupted)
    mask[0, :2] = 0
    _, cache = model.run_with_cache(clean, attention_mask=mask)
    receivers = [Site("q", 2, head=1)]
    found = path_patch(model, corrupted, cache, METRIC, receivers, SENDERS[:2], attention_mask=mask)
    expected = [reference(model, corrupted, cache, s, receivers, "frozen", mask) for s in SENDERS[:2]]
    np.testing.assert_allclose(found.values, np.stack(expected), atol=1e-5 * float(np.abs(expected).max()))


def test_a_sender_after_every_receiver_changes_nothing(model: HookedTransformer, prompts: tuple[Array, Array]) -> None:
    clean, corrupted = prompts
    _, cache = model.run_with_cache(clean)
    found = path_patch(model, corrupted, cache, METRIC, [Site("q", 1, head=1)], [Site("z", 1, head=0), Site("z", 3)])
    np.testing.assert_array_equal(found.values, np.stack([np.asarray(METRIC(model(corrupted)))] * 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"receivers": [Site("z", 2, head=1)]}, "blocks.2.attn.hook_z.*receiver"),
        ({"senders": [Site("q", 2, head=1)]}, "blocks.2.attn.hook_q.*sender"),
        ({"receivers": "heads"}, "receivers='heads'"),
        ({"receivers": []}, "empty"),
        ({"mlps": "thawed"}, "mlps='thawed'"),
        ({"senders": [Site("z", 9, head=1)]}, "4 layers"),
        ({"senders": [Site("z", 1, head=4)]}, "there is no 4"),
    ],
)
def test_bad_input(model: HookedTransformer, prompts: tuple[Array, Array], options: dict[str, Any], said: str) -> None:
    clean, corrupted = prompts
    _, cache = model.run_with_cache(clean)
    with pytest.raises((InputError, KeyError), match=said):
        path_patch(model, corrupted, cache, METRIC, **options)


def test_it_is_refused_under_hooks(model: HookedTransformer, prompts: tuple[Array, Array]) -> None:
    clean, corrupted = prompts
    _, cache = model.run_with_cache(clean)
    hook = ("blocks.0.hook_resid_pre", lambda value, hook: value * 0)
    with model.hooks([hook]), pytest.raises(InputError, match="leave the hooks"):
        path_patch(model, corrupted, cache, METRIC)
