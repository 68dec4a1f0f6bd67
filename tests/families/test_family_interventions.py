"""Interventions of every family: what a Python function with the same change gives, in TransformerLens where it is right."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlens import Ablate, HookedTransformer, InputError, Patch, Scale, Steer, surgery
from graphlens.edits.kinds import Intervention
from graphlens.file.manifest import HookEntry
from graphlens.file.names import SCORES, split_name
from tests.families.comparing import TOLERANCE, prompt, relative
from tests.families.variants import CHOSEN, VARIANTS

TOKENS = prompt(101, 2, 11)
IDS = torch.from_numpy(TOKENS)
Model = Callable[[str], HookedTransformer]
Change = Callable[[np.ndarray], np.ndarray]


def part_of(
    entry: HookEntry, shape: Sequence[int], draw: np.random.Generator
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """A selection as an intervention has it, and as NumPy indexes the activation with it."""
    fields: dict[str, Any] = {}
    index: list[Any] = []
    for axis, size in zip(entry.axes, shape, strict=True):
        chosen: Any = slice(None)
        if axis in ("pos", "query_pos"):
            chosen = fields["positions"] = slice(1, size - 1)
        elif axis.endswith("head_index"):
            chosen = fields["heads"] = int(draw.integers(size))
        elif axis == entry.axes[-1] and size > 1:
            chosen = fields["dims"] = slice(0, size // 2 + 1)
        index.append(chosen)
    return fields, tuple(index)


def edit_at(hook: str, entry: HookEntry, activation: np.ndarray, kind: int) -> tuple[Intervention, Change]:
    """An intervention at a part of a hook point, and the same as a function."""
    draw = np.random.default_rng(zlib.crc32(hook.encode()) + kind)
    fields, index = part_of(entry, activation.shape, draw)
    part = activation[index]
    operand = draw.uniform(0.5, 1.5, part.shape[-1:]).astype(np.float32)
    whole = np.where(np.isfinite(part), part, 0)[..., ::-1] * np.float32(0.5) + np.float32(0.75)
    positive = "hook_scale" in hook
    made: tuple[Intervention, Change] = [
        (Ablate(hook, 1.0 if positive else 0.0, **fields), lambda x: np.full_like(x, 1.0 if positive else 0.0)),
        (Scale(hook, operand, **fields), lambda x: x * operand),
        (Steer(hook, operand, 0.5, **fields), lambda x: x + np.float32(0.5) * operand),
        (Patch(hook, whole, **fields), lambda x: whole),
    ][kind]
    edit, change = made

    def changed(x: np.ndarray) -> np.ndarray:
        new = x.copy()
        new[index] = change(x[index])
        return np.where(np.isneginf(x), x, new) if split_name(hook)[1] == SCORES else new

    return edit, changed


@pytest.mark.parametrize("name", CHOSEN)
def test_every_kind_at_every_hook_point_of_a_block(
    name: str, family_model: Model, family_checkpoint: Callable[[str], Path]
) -> None:
    """All at once, kinds in turn: each hook point gets every kind in one of four runs, at some heads and positions."""
    model = family_model(name)
    entries = model.runner.engine.hooks(model.runner.plan())
    _, cache = model.run_with_cache(TOKENS)
    names = [hook for hook in cache if hook.startswith("blocks.1.") and not hook.endswith("expert_indices")]
    lens: Any = None
    if VARIANTS[name].lens is not None:
        from tests.families.lens import lens_of

        lens = lens_of(name, family_checkpoint(name))
    for turn in range(4):
        edits, hooks, torch_hooks = [], [], []
        for place, hook in enumerate(names):
            edit, change = edit_at(hook, entries[hook], cache[hook], (place + turn) % 4)
            edits.append(edit)
            hooks.append((hook, lambda x, hook, change=change: change(x)))
            torch_hooks.append((hook, lambda x, hook, change=change: torch.from_numpy(change(x.numpy()))))
        found = model.run_with_interventions(TOKENS, edits)
        expected = (
            model.run_with_hooks(TOKENS, fwd_hooks=hooks)
            if lens is None
            else lens.run_with_hooks(IDS, fwd_hooks=torch_hooks)
        )
        assert relative(found, expected, f"{name}, turn {turn}") <= TOLERANCE
        assert relative(found, model(TOKENS), name) > 0.1


@pytest.mark.parametrize("name", CHOSEN)
def test_an_edit_and_a_hook_cost_as_many_nodes_as_in_gpt_2(name: str, family_folder: Callable[[str], Path]) -> None:
    graph = surgery.load(family_folder(name))
    hooks = surgery.read_manifest(graph).hooks
    before = len(list(graph.graph))
    parts = ("scale", "add", "patch")
    floats = [hook for hook, entry in hooks.items() if entry.dtype.startswith("float")]
    gated = surgery.with_gates(graph, dict.fromkeys(floats, parts))
    masked = sum(split_name(hook)[1] == SCORES for hook in floats)
    assert len(list(gated.graph)) - before == len(parts) * len(floats) + 2 * masked
    called = surgery.with_python_gates(graph)
    assert len(list(called.graph)) - before == len(hooks)


@pytest.mark.parametrize("name", CHOSEN)
def test_heads_of_keys_and_values_are_those_that_there_are(name: str, family_model: Model) -> None:
    model = family_model(name)
    count = model.cfg.n_key_value_heads
    for hook in ("blocks.0.attn.hook_k", "blocks.1.attn.hook_v"):
        with pytest.raises(InputError, match=f"has {count} "):
            model.run_with_interventions(TOKENS, Ablate(hook, heads=count))
        every = model.run_with_interventions(TOKENS, [Ablate(hook, heads=head) for head in range(count)])
        np.testing.assert_array_equal(every, model.run_with_interventions(TOKENS, Ablate(hook)))


def joint(model: HookedTransformer) -> list[str]:
    """The hook points whose first axis is batch, positions and more in one."""
    entries = model.runner.engine.hooks(model.runner.plan())
    return [name for name, entry in entries.items() if entry.axes[0].startswith("batch_")]


@pytest.mark.parametrize("name", CHOSEN)
def test_what_has_no_positions_is_edited_whole_or_refused(name: str, family_model: Model) -> None:
    model = family_model(name)
    names = [hook for hook in joint(model) if not hook.endswith(("hook_scale", "indices"))]
    if not names:
        pytest.skip("each of its activations has batch and positions")
    _, other = model.run_with_cache(TOKENS[::-1].copy())
    for hook in names[:2]:
        for field in ("positions", "heads", "batch"):
            with pytest.raises(InputError, match=rf"it has no {field} .*in TransformerLens: use a Python hook"):
                model.run_with_interventions(TOKENS, Ablate(hook, **{field: 0}))
        with pytest.raises(InputError, match="does not fit the activation"):
            model.run_with_interventions(TOKENS, Patch(hook, other[hook][:-3]))
        expected = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, lambda x, hook: other[hook.name])])
        np.testing.assert_array_equal(model.run_with_interventions(TOKENS, Patch(hook, other[hook])), expected)
        assert relative(expected, model(TOKENS), hook) > 1e-3

        graph = surgery.load(model.runner.engine.path)
        with pytest.raises(InputError, match="depends on the batch and the length"):
            surgery.bake(graph, [Patch(hook, other[hook])])
        surgery.bake(graph, [Scale(hook, 0.5), Ablate(hook, dims=1)])
