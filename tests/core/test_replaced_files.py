"""A model whose files are replaced while it is open: it never mixes what it was opened from with what lies there now."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import Ablate, HookedTransformer, KeyValueCache, Scale, process_weights
from graphlens.errors import InputError, ModelFileError
from graphlens.metrics import LogitDiff

TOKENS = [[1, 2, 3, 4]]
NOTHING = Scale("blocks.1.attn.hook_z", 1.0)  # an edit opens a session of its own
REPLACED = "was replaced since the model was opened"


def replace(path: Path, content: bytes) -> None:
    """As programs that write whole files do it: another file is renamed to the path."""
    other = path.with_name("other")
    other.write_bytes(content)
    os.replace(other, path)


def other_weights(folder: Path) -> None:
    """Same names, same sizes, other numbers."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    replace(path, raw[:start] + (np.frombuffer(raw[start:], np.float32) * np.float32(1.05)).tobytes())


def another_model(folder: Path) -> None:
    """A model that opens, of the same architecture."""
    made = process_weights(folder, folder.parent / "processed")
    for file in Path(made).iterdir():
        replace(folder / file.name, file.read_bytes())


@pytest.mark.parametrize("change", [other_weights, another_model])
def test_sessions_and_weights_that_are_opened_later_are_refused(change: Any, tiny_copy: Path) -> None:
    model, unread = (HookedTransformer.from_onnx(tiny_copy, "cpu") for _ in range(2))
    expected, bias = model(TOKENS), model.b_O
    change(tiny_copy)
    with pytest.raises(ModelFileError, match=REPLACED):
        model.run_with_interventions(TOKENS, NOTHING)
    with pytest.raises(ModelFileError, match=REPLACED):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", lambda embed, hook: None)])
    with pytest.raises(ModelFileError, match=REPLACED):
        model.gradients(TOKENS, LogitDiff(5, 7))
    with pytest.raises(ModelFileError, match=REPLACED):
        model.bake(NOTHING, tiny_copy.parent / "baked")
    with pytest.raises(ModelFileError, match=REPLACED):
        _ = unread.W_E
    with pytest.raises(ModelFileError, match=REPLACED):
        unread(TOKENS)
    np.testing.assert_array_equal(model(TOKENS), expected)  # what was open before goes on
    np.testing.assert_array_equal(model.b_O, bias)


def test_a_file_that_is_gone_is_refused(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    shutil.rmtree(tiny_copy)
    with pytest.raises(ModelFileError, match=REPLACED):
        model(TOKENS)


def test_a_file_with_the_same_content_is_the_same(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    expected = model(TOKENS)
    for file in ("model.onnx", "model.safetensors"):
        os.utime(tiny_copy / file, (1, 1))
        replace(tiny_copy / file, (tiny_copy / file).read_bytes())
    np.testing.assert_allclose(model.run_with_interventions(TOKENS, NOTHING), expected, atol=1e-5)


def test_another_model_in_the_same_place_is_another(tiny_copy: Path) -> None:
    old = HookedTransformer.from_onnx(tiny_copy, "cpu")
    packed = pickle.dumps(old)
    another_model(tiny_copy)
    new = HookedTransformer.from_onnx(tiny_copy, "cpu")
    assert old.runner.identity != new.runner.identity
    with pytest.raises(ModelFileError, match="another model than the one that was pickled"):
        pickle.loads(packed)
    with pytest.raises(ModelFileError, match="another model than the one that was pickled"):
        pickle.loads(pickle.dumps(old))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(new))(TOKENS), new(TOKENS))


def test_keys_and_values_of_the_model_that_was_there_are_refused(tiny_copy: Path) -> None:
    old = HookedTransformer.from_onnx(tiny_copy, "cpu")
    past = KeyValueCache.init_cache(old.cfg, batch_size=1)
    old(TOKENS, past_kv_cache=past)
    another_model(tiny_copy)
    with pytest.raises(InputError, match="another model"):
        HookedTransformer.from_onnx(tiny_copy, "cpu")([[5]], past_kv_cache=past)


def test_how_many_sessions_stay_open(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    edits = [
        Ablate(name, heads=1) for name in ("blocks.0.attn.hook_z", "blocks.2.attn.hook_q", "blocks.3.attn.hook_pattern")
    ]
    expected = [model.run_with_interventions(TOKENS, edit) for edit in edits]
    model.runner.engine.max_sessions = 1
    for _ in range(2):
        for edit, before in zip(edits, expected, strict=True):
            np.testing.assert_array_equal(model.run_with_interventions(TOKENS, edit), before)
            assert len([plan for plan in model.sessions if plan.gates]) == 1
    for number in (0, -1):
        with pytest.raises(InputError, match=r"max_sessions must be a whole number of 1 or more"):
            model.runner.engine.max_sessions = number
