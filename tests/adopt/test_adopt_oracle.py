"""The oracle of foreign files is right itself: transformers' own logits, and graphlens's own export at every hook point."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import graphlens
from tests.adopt.adopt_cases import PAST, cases_of, inputs_of, real_of
from tests.adopt.adopt_files import Files
from tests.adopt.cells import difference, opened
from tests.adopt.checkpoints import FAMILIES, load
from tests.adopt.oracle import Oracle
from tests.families.comparing import edit_of

pytest_plugins = ["tests.adopt.session_files"]

OWN = [f"small-{family}" for family in FAMILIES if family != "vit"]  # graphlens exports no ViT


@pytest.mark.parametrize("name", [f"small-{family}" for family in FAMILIES])
def test_its_logits_are_transformers(name: str, files: Files) -> None:
    oracle, model = Oracle(name, files.checkpoint(name)), load(files.checkpoint(name))
    for case in cases_of(name):
        given = inputs_of(name, case)
        expected = model(**{key: torch.from_numpy(value) for key, value in given.items()}).logits.numpy()
        found = oracle.run(case)["out.logits"]
        expected = expected[:, PAST.get(case, 0) :] if case in PAST else expected
        assert difference(found, expected, real_of(given), "logits", f"{name} {case}") < 2e-6


@pytest.mark.parametrize("name", OWN)
def test_its_activations_are_those_of_our_own_export(name: str, files: Files) -> None:
    folder = files.root / "own-beside-the-oracle" / name  # "own" may be there already, of another file's tests
    graphlens.export_model(files.checkpoint(name), folder, announce=lambda _: None)
    model, expected = opened(folder, name), Oracle(name, files.checkpoint(name)).run("plain")
    options = {"token_type_ids": expected["in.token_type_ids"]} if name == "small-bert" else {}
    _, cache = model.run_with_cache(expected["in.input_ids"], **options)
    assert set(cache) == {key for key in expected if not key.startswith(("in.", "out."))}
    for hook, value in cache.items():
        assert difference(np.asarray(value), expected[hook], None, hook, hook) < 1e-5


def test_its_edits_are_those_of_our_own_export(files: Files) -> None:
    folder = files.root / "own-edited"
    graphlens.export_model(files.checkpoint("small-gemma2"), folder, announce=lambda _: None)
    model, oracle = opened(folder, "small-gemma2"), Oracle("small-gemma2", files.checkpoint("small-gemma2"))
    tokens = inputs_of("small-gemma2", "plain")["input_ids"]
    hooks = [hook for hook in oracle.editable() if ".1." not in hook]
    assert len(hooks) > 20
    for hook in hooks:
        ours = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda value, hook: edit_of(hook.name, value))])
        theirs = oracle.edited("plain", hook, lambda value, hook=hook: edit_of(hook, value))
        assert difference(np.asarray(ours), theirs, None, hook, hook) < 1e-5


def test_another_value_would_be_seen(files: Files) -> None:
    expected = Oracle("small-llama", files.checkpoint("small-llama")).run("plain")
    found = expected["blocks.1.attn.hook_z"].copy()
    found[1, 3, 2, 5] += 1e-3
    assert difference(found, expected["blocks.1.attn.hook_z"], None, "blocks.1.attn.hook_z", "z") > 1e-4
    swapped = expected["blocks.1.attn.hook_z"][:, :, ::-1]
    assert difference(swapped, expected["blocks.1.attn.hook_z"], None, "blocks.1.attn.hook_z", "z") > 1e-2
