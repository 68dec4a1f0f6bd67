"""Path patching and circuits of every family, against their definitions in whole runs with Python hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from graphlens import HookedTransformer, InputError
from graphlens.analysis.edges import Edge, Node
from graphlens.attribution import attribution_patch, edge_attribution, faithfulness
from graphlens.experiments.circuits import ResidualGraph
from graphlens.metrics import LogitDiff
from graphlens.patching import Site, path_patch
from tests.core.test_paths import METRIC
from tests.families.variants import SUMMED

Array = npt.NDArray[Any]
CLEAN, CORRUPTED = (np.random.default_rng(seed).integers(0, 101, (2, 9)) for seed in (1, 2))
MASK = np.ones((2, 9), int)
MASK[0, :3] = 0
DIFFERENCE = LogitDiff(5, 7)


@pytest.fixture(scope="module", params=SUMMED)
def model(request: pytest.FixtureRequest, family_model: Callable[[str], HookedTransformer]) -> HookedTransformer:
    found = family_model(request.param)
    found.runner.engine.max_sessions = 48
    return found


# Path patching

SENDERS = [
    Site("embed", position=2),
    Site("z", 0, head=2),
    Site("z", 1, head=0, position=3),
    Site("attn_out", 1),
    Site("mlp_out", 0),
    Site("blocks.1.mlp.hook_post", dims=[3, 40, 70]),
    Site("mlp_out", 1, position=6),
    Site("z", 2, head=1),
]


@pytest.mark.parametrize("options", [{}, {"attention_mask": MASK}], ids=["whole", "left-padded"])
@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
def test_path_patching_is_its_definition(mlps: str, options: dict[str, Any], model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN, **options)
    last = model.cfg.n_key_value_heads - 1
    senders = [sender for sender in SENDERS if sender.hook in cache]
    every: list[list[Site] | None] = [
        None,
        [Site("q", 2, head=1)],
        [Site("k", 1, head=last), Site("k", 2, head=0), Site("v", 2, head=last)],
    ]
    for receivers in every:
        found = path_patch(
            model, CORRUPTED, cache, METRIC, receivers or "logits", senders, mlps=mlps, verbose=False, **options
        )
        expected = np.stack(
            [by_definition(model, cache, s, receivers, mlps, options.get("attention_mask")) for s in senders]
        )
        scale = float(np.abs(expected).max())
        assert np.abs(found.values - expected).max() <= 1e-5 * scale
        changed = np.abs(expected - np.asarray(METRIC(model(CORRUPTED, **options)))).max(1)
        assert changed.max() > 1e-4 * scale, "no sender changes anything, so this tests nothing"


def by_definition(
    model: HookedTransformer, clean: Any, sender: Site, receivers: Sequence[Site] | None, mlps: str, mask: Array | None
) -> Array:
    """The metric [b] in runs in which heads and, if frozen, MLPs write what they wrote in the corrupted run."""
    _, base = model.run_with_cache(CORRUPTED, attention_mask=mask)
    seen: dict[str, Array] = {}

    def frozen(activation: Array, hook: Any) -> Array:
        return base[hook.name].copy()

    def sent(activation: Array, hook: Any) -> Array:
        found, index = base[hook.name].copy(), [slice(None)] * base[hook.name].ndim
        for axis, part in ((1, sender.position), (2, sender.head), (-1, sender.dims)):
            if part is not None:
                index[axis] = list(part) if isinstance(part, tuple) else part
        found[tuple(index)] = clean[hook.name][tuple(index)]
        return found

    def look(activation: Array, hook: Any) -> None:
        seen[hook.name] = activation.copy()

    hooks: dict[str, Callable[..., Any]] = {}
    for layer in range(model.cfg.n_layers):
        hooks[f"blocks.{layer}.attn.hook_z"] = frozen
        if mlps == "frozen" and not sender.hook.startswith(f"blocks.{layer}.mlp"):
            hooks[f"blocks.{layer}.hook_mlp_out"] = frozen
    hooks[sender.hook] = sent
    looks = [(f"blocks.{layer}.attn.hook_{letter}", look) for layer in range(model.cfg.n_layers) for letter in "qkv"]
    logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[*hooks.items(), *looks], attention_mask=mask)
    if receivers is None:
        return np.asarray(METRIC(logits))

    def patch(activation: Array, hook: Any) -> Array:
        for receiver in receivers:
            if receiver.hook == hook.name:
                activation[:, :, receiver.head] = seen[hook.name][:, :, receiver.head]
        return activation

    names = {receiver.hook for receiver in receivers}
    patched = model.run_with_hooks(CORRUPTED, fwd_hooks=[(n, patch) for n in names], attention_mask=mask)
    return np.asarray(METRIC(patched))


# Circuits


def norm_after_attention(model: HookedTransformer) -> str:
    """The norm of attention's output, "" if there is none."""
    if model.cfg.post_norm_only:
        return "ln1"
    return "ln1_post" if model.cfg.use_normalization_before_and_after else ""


def written_by_heads(model: HookedTransformer, layer: int, z: Array, run: Any) -> dict[Node, Array]:
    """What each head writes: its output through W_O, and through the norm after attention with the scale of the run."""
    w_o, found = np.asarray(model.weights[f"blocks.{layer}.attn.W_O"]), {}
    for head in range(model.cfg.n_heads):
        written = z[:, :, head] @ w_o[head]
        norm = norm_after_attention(model)
        if norm:
            weight = np.asarray(model.weights[f"blocks.{layer}.{norm}.w"])
            written = written / run[f"blocks.{layer}.{norm}.hook_scale"] * weight
        found[Node("head", layer, head)] = written
    return found


def circuit_by_definition(model: HookedTransformer, circuit: Sequence[Edge], clean: Any, base: Any) -> Array:
    """The logits of a run in which a circuit carries the clean prompt, a whole run for each input and each output."""
    changed = {Node("embed"): clean["blocks.0.hook_resid_pre"] - base["blocks.0.hook_resid_pre"]}

    def after(setting: dict[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
        hooks = [(name, lambda activation, hook, value=value: value) for name, value in setting.items()]
        seen: dict[str, Array] = {}

        def look(activation: Array, hook: Any) -> None:
            seen[hook.name] = activation.copy()

        seen["logits"] = model.run_with_hooks(CORRUPTED, fwd_hooks=[*hooks, *((name, look) for name in wanted)])
        return seen

    def read(receiver: Node, residual: Array) -> Array:
        senders = [edge.sender for edge in circuit if edge.receiver == receiver]
        return residual + sum((changed[sender] for sender in senders), np.zeros_like(residual))

    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}."
        heads = {}
        for letter in "qkv":
            name = f"{at}attn.hook_{letter}"
            heads[name] = base[name].copy()
            for head in range(heads[name].shape[2]):
                residual = read(Node("head", layer, head, letter), base[f"{at}hook_resid_pre"])
                heads[name][:, :, head] = after({f"{at}hook_resid_pre": residual}, [name])[name][:, :, head]
        norm = norm_after_attention(model)
        scale = [f"{at}{norm}.hook_scale"] if norm else []
        run = after(heads, [f"{at}attn.hook_z", *scale])
        new = written_by_heads(model, layer, run[f"{at}attn.hook_z"], run)
        old = written_by_heads(model, layer, base[f"{at}attn.hook_z"], base)
        changed |= {node: new[node] - old[node] for node in new}
        stream = f"{at}hook_resid_pre" if model.cfg.parallel_attn_mlp else f"{at}hook_resid_mid"
        residual = read(Node("mlp", layer), base[stream])
        changed[Node("mlp", layer)] = after({stream: residual}, [f"{at}hook_mlp_out"])[f"{at}hook_mlp_out"]
        changed[Node("mlp", layer)] = changed[Node("mlp", layer)] - base[f"{at}hook_mlp_out"]
    end = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    return after({end: read(Node("logits"), base[end])}, [])["logits"]


def test_a_circuit_is_its_definition(model: HookedTransformer) -> None:
    clean_logits, clean = model.run_with_cache(CLEAN)
    _, base = model.run_with_cache(CORRUPTED)
    graph = ResidualGraph.of(model.runner, CORRUPTED, clean, DIFFERENCE)
    every, draw = graph.edges, np.random.default_rng(4)
    circuits = {f"random {i}": [every[j] for j in draw.permutation(len(every))[: len(every) // 2]] for i in range(2)}
    names = {name: list(map(str, edges)) for name, edges in circuits.items()}
    result = faithfulness(model, CORRUPTED, clean, DIFFERENCE, {"all": list(map(str, every)), "none": [], **names})
    expected = [DIFFERENCE(clean_logits), DIFFERENCE(model(CORRUPTED))]
    expected += [DIFFERENCE(circuit_by_definition(model, edges, clean, base)) for edges in circuits.values()]
    assert np.ptp(expected) > 1e-2
    assert np.abs(result.values - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_parallel_mlp_does_not_read_the_heads_beside_it(model: HookedTransformer) -> None:
    _, clean = model.run_with_cache(CLEAN)
    graph = ResidualGraph.of(model.runner, CORRUPTED, clean, DIFFERENCE)
    beside = Edge(Node("head", 1, 0), Node("mlp", 1))
    assert (beside in graph.edges) == (not model.cfg.parallel_attn_mlp)


def test_edge_scores_sum_to_attribution_scores(model: HookedTransformer) -> None:
    """Over the receivers of a sender, since what it writes reaches the metric through them alone."""
    _, clean = model.run_with_cache(CLEAN)
    found = edge_attribution(model, CORRUPTED, clean, DIFFERENCE)
    sums: dict[str, float] = {}
    for label, value in zip(found.labels["edge"], found.values, strict=True):
        sender = label.split("->")[0]
        sums[sender] = sums.get(sender, 0.0) + float(value)
    layers = range(model.cfg.n_layers)
    sites = [Site("blocks.0.hook_resid_pre"), *(Site("mlp_out", layer) for layer in layers)]
    named = ["embed", *(f"L{layer}MLP" for layer in layers)]
    # Edges keep the scale of a norm after attention as it is, and the gradient of z does not.
    if not norm_after_attention(model):
        sites += [Site("z", layer, head=head) for layer in layers for head in range(model.cfg.n_heads)]
        named += [f"L{layer}H{head}" for layer in layers for head in range(model.cfg.n_heads)]
    estimates = attribution_patch(model, CORRUPTED, sites, clean, DIFFERENCE, verbose=False)
    expected = estimates.values - estimates.baselines["corrupted"]
    np.testing.assert_allclose([sums[name] for name in named], expected, atol=2e-4 * np.abs(expected).max())


def test_the_outputs_of_heads_are_senders_where_they_add_up(model: HookedTransformer) -> None:
    with contextlib.suppress(InputError):  # refused where it cannot be had
        model.set_use_attn_result(True)
    try:
        _, clean = model.run_with_cache(CLEAN)
        if "blocks.1.attn.hook_result" not in clean:
            return
        result = Site("blocks.1.attn.hook_result", head=1)
        if norm_after_attention(model):
            with pytest.raises(InputError, match=r"not the sum of attn\.hook_result"):
                path_patch(model, CORRUPTED, clean, METRIC, "logits", result, verbose=False)
            return
        found, same = (
            path_patch(model, CORRUPTED, clean, METRIC, "logits", sender, verbose=False).values
            for sender in (result, Site("z", 1, head=1))
        )
        np.testing.assert_allclose(found, same, atol=1e-5 * np.abs(same).max())
    finally:
        model.set_use_attn_result(False)
