"""The entries of a KV cache, beside TransformerLens 3.9: what they hold, what may be put in, and what runs make of it."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens
from lens_oracle import oracle
from transformer_lens import TransformerLensKeyValueCache, TransformerLensKeyValueCacheEntry

import graphlens
import graphlens.torch
from graphlens.errors import InputError
from graphlens.model.kv_cache import KeyValueCache, KeyValueCacheEntry
from tests.closeness import close

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(1, 500, (3, 9)))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [1] * 9])


@pytest.fixture(scope="module")
def lens() -> Any:
    return oracle(graphlens.embedded_model())


@pytest.fixture(scope="module", params=["arrays", "tensors"])
def ours(request: pytest.FixtureRequest) -> Any:
    kind: Any = graphlens.HookedTransformer if request.param == "arrays" else graphlens.torch.HookedTransformer
    return kind.from_onnx(graphlens.embedded_model(), "cpu")


def given(model: Any, value: Any) -> Any:
    """A value as the model's face takes it."""
    return value.numpy() if isinstance(value, torch.Tensor) and isinstance(model.W_E, np.ndarray) else value


def kinds(model: Any) -> tuple[Any, Any]:
    """The classes of a cache and of an entry."""
    if isinstance(model, transformer_lens.HookedTransformer):
        return TransformerLensKeyValueCache, TransformerLensKeyValueCacheEntry
    return KeyValueCache, KeyValueCacheEntry


def filled(model: Any, rows: int = 3, length: int = 6) -> Any:
    """A cache that the first tokens were run into, some of them padding."""
    cache = kinds(model)[0].init_cache(model.cfg, "cpu", rows)
    tokens, mask = given(model, TOKENS[:rows, :length]), given(model, MASK[:rows, :length])
    model(tokens, attention_mask=mask, past_kv_cache=cache)
    return cache


def continued(model: Any, cache: Any, tokens: torch.Tensor = TOKENS[:, 6:]) -> Any:
    mask = torch.ones_like(tokens)  # theirs asks a tokenizer for it otherwise
    return model(given(model, tokens), attention_mask=given(model, mask), past_kv_cache=cache)


def alike(found: Any, expected: Any) -> None:
    """Two caches hold the same."""
    assert len(found.entries) == len(expected.entries)
    assert found.frozen == expected.frozen
    mask = np.asarray(found.previous_attention_mask)
    np.testing.assert_array_equal(mask, expected.previous_attention_mask.numpy())
    for layer, (mine, theirs) in enumerate(zip(found.entries, expected.entries, strict=True)):
        assert found[layer] is mine
        assert mine.frozen == theirs.frozen
        for name in ("past_keys", "past_values"):
            close(np.asarray(getattr(mine, name)), getattr(theirs, name))


def test_signatures_and_names() -> None:
    entry = KeyValueCacheEntry(np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1)))
    made = {KeyValueCache: KeyValueCache([entry], [[1]]), KeyValueCacheEntry: entry}
    for theirs, mine in (
        (TransformerLensKeyValueCache, KeyValueCache),
        (TransformerLensKeyValueCacheEntry, KeyValueCacheEntry),
    ):
        names = {name for name in dir(theirs) if not name.startswith("_")} | set(inspect.signature(theirs).parameters)
        assert names <= set(dir(made[mine]))
        for name in ("__init__", "init_cache" if mine is KeyValueCache else "init_cache_entry"):
            expected = inspect.signature(getattr(theirs, name)).parameters
            found = inspect.signature(getattr(mine, name)).parameters
            assert list(found) == list(expected)
            assert all(found[key].default == p.default for key, p in expected.items() if p.default is not p.empty)
    for door in (graphlens, graphlens.torch):
        for prefix in ("", "HookedTransformer", "TransformerLens"):
            assert getattr(door, f"{prefix}KeyValueCache") is KeyValueCache
            assert getattr(door, f"{prefix}KeyValueCacheEntry") is KeyValueCacheEntry


def test_an_empty_cache(lens: Any, ours: Any) -> None:
    expected, found = (kinds(model)[0].init_cache(model.cfg, "cpu", 2) for model in (lens, ours))
    for mine, theirs in zip(found.entries, expected.entries, strict=True):
        assert mine.past_keys.shape == theirs.past_keys.shape == (2, 0, ours.cfg.n_heads, ours.cfg.d_head)
        assert isinstance(mine.past_values, type(ours.W_E) if isinstance(ours.W_E, np.ndarray) else torch.Tensor)
        assert np.asarray(mine.past_keys).dtype == theirs.past_keys.numpy().dtype
    assert tuple(found.previous_attention_mask.shape) == tuple(expected.previous_attention_mask.shape) == (2, 0)
    assert found.present == {}


def test_what_a_run_leaves_in_it(lens: Any, ours: Any) -> None:
    expected, found = filled(lens), filled(ours)
    alike(found, expected)
    close(np.asarray(continued(ours, found)), continued(lens, expected))
    alike(found, expected)
    found.freeze(), expected.freeze()
    alike(found, expected)
    continued(ours, found)
    assert found.length == found[0].length == 9
    found.unfreeze(), expected.unfreeze()
    alike(found, expected)


Change = Callable[[Any, Any], Any]


def some_rows(model: Any, cache: Any) -> Any:
    """A cache of some of the prompts, made of its parts: what people write."""
    kind, entry_kind = kinds(model)
    rows = [2, 0]
    entries = [entry_kind(e.past_keys[rows], e.past_values[rows], e.frozen) for e in cache.entries]
    return kind(entries, cache.previous_attention_mask[rows], cache.frozen)


def by_name(model: Any, cache: Any) -> Any:
    kind, entry_kind = kinds(model)
    entries = [entry_kind(past_keys=e.past_keys[1:], past_values=e.past_values[1:]) for e in cache.entries]
    return kind(entries=entries, previous_attention_mask=cache.previous_attention_mask[1:])


def set_in_an_empty_one(model: Any, cache: Any) -> Any:
    """Keys, values and the mask of a longer past, assigned: two prefixes one after the other."""
    longer = kinds(model)[0].init_cache(model.cfg, device=model.cfg.device, batch_size=2)
    join: Any = np.concatenate if isinstance(cache[0].past_keys, np.ndarray) else torch.cat
    for layer, entry in enumerate(cache.entries):
        longer.entries[layer].past_keys = join([entry.past_keys[:2], entry.past_keys[1:]], 1)
        longer.entries[layer].past_values = join([entry.past_values[:2], entry.past_values[1:]], 1)
    longer.previous_attention_mask = join([cache.previous_attention_mask[:2], cache.previous_attention_mask[1:]], 1)
    return longer


def written_into(model: Any, cache: Any) -> Any:
    cache.entries[1].past_values[:, 3] = 0
    cache[2].past_keys[0] *= 0.5
    cache.previous_attention_mask[1, 2] = 0
    return cache


def appended(model: Any, cache: Any) -> Any:
    """The last position once more, as a run would add it."""
    for entry in cache.entries:
        keys, values = entry.append(entry.past_keys[:, -1:], entry.past_values[:, -1:])
        assert keys.shape == values.shape == entry.past_keys.shape
    mask = cache.append_attention_mask(given(model, torch.tensor([[1], [1], [0]])))
    assert mask.shape == cache.previous_attention_mask.shape
    return cache


@pytest.mark.parametrize("change", [some_rows, by_name, set_in_an_empty_one, written_into, appended])
def test_what_is_put_in_is_what_the_next_run_reads(lens: Any, ours: Any, change: Change) -> None:
    expected, found = (change(model, filled(model)) for model in (lens, ours))
    tokens = TOKENS[: len(expected.previous_attention_mask), 6:]
    plain = np.asarray(continued(ours, filled(ours, len(tokens)), tokens))
    logits = np.asarray(continued(ours, found, tokens))
    close(logits, continued(lens, expected, tokens))
    assert np.abs(logits - plain).max() > 1e-2
    alike(found, expected)
    close(np.asarray(continued(ours, found, tokens)), continued(lens, expected, tokens))


def test_a_frozen_cache_gives_longer_ones_and_stays(lens: Any, ours: Any) -> None:
    new = torch.ones(3, 2, dtype=torch.int64)
    found = []
    for model in (lens, ours):
        cache = filled(model)
        cache.freeze()
        entry = cache[1]
        keys, values = entry.append(entry.past_keys[:, :2], entry.past_values[:, :2])
        mask = cache.append_attention_mask(given(model, new))
        assert entry.past_keys.shape[1] == cache.previous_attention_mask.shape[1] == 6
        found.append((keys, values, mask))
    for theirs, mine in zip(*found, strict=True):
        close(np.asarray(mine), np.asarray(theirs))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_of_a_cache_that_was_looked_into(ours: Any, copied: Callable[[Any], Any]) -> None:
    cache = filled(ours)
    assert cache[0].past_keys.shape[1] == 6
    other = copied(cache)
    np.testing.assert_array_equal(np.asarray(continued(ours, other)), np.asarray(continued(ours, filled(ours))))
    assert (cache.length, cache[0].length, other.length) == (6, 6, 9)
    if copied is not copy.copy:
        other = copied(cache)
        other[0].past_values[:] = 0
        assert np.asarray(cache[0].past_values).any()


def test_generation_with_entries_looked_at_between_steps(ours: Any) -> None:
    tokens = TOKENS[:1, :4]
    cache = KeyValueCache.init_cache(ours.cfg, batch_size=1)
    chosen = []
    piece = tokens
    for _ in range(4):
        logits = np.asarray(ours(given(ours, piece), past_kv_cache=cache))
        assert all(entry.past_keys.shape[1] == cache.length for entry in cache.entries)
        piece = torch.tensor([[int(logits[0, -1].argmax())]])
        chosen.append(int(piece))
    expected = np.asarray(ours.generate(given(ours, tokens), 4, do_sample=False, stop_at_eos=False, verbose=False))
    assert chosen == expected[0, 4:].tolist()


# Rotary positions


def test_keys_with_rotary_positions_are_rotated_and_put_in_with_a_warning() -> None:
    model = graphlens.HookedTransformer.from_onnx(graphlens.embedded_model("tiny-llama"), "cpu")
    tokens = TOKENS.numpy() % 500
    cache = KeyValueCache.init_cache(model.cfg, batch_size=3)
    _, values = model.run_with_cache(tokens[:, :6], past_kv_cache=cache)
    for layer, entry in enumerate(cache.entries):
        np.testing.assert_allclose(entry.past_keys, values["rot_k", layer], atol=1e-6)
        np.testing.assert_allclose(entry.past_values, values["v", layer], atol=1e-6)
    whole = model(tokens)[:, 6:]
    rows = some_rows(model, cache)
    close(model(tokens[:, 6:], past_kv_cache=cache), whole)  # looking is no change
    with pytest.warns(UserWarning, match="are rotated to the positions at which they were computed"):
        found = model(tokens[[2, 0], 6:8], past_kv_cache=rows)
    close(found, whole[[2, 0], :2])
    close(model(tokens[[2, 0], 8:], past_kv_cache=rows), whole[[2, 0], 2:])


# Refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda cache: KeyValueCache([], [[1]]), "entries are a list"),
        (lambda cache: KeyValueCache([1], [[1]]), "not of int"),  # type: ignore[list-item]
        (lambda cache: KeyValueCache(cache.entries, [1, 1]), "[batch, past]"),
        (lambda cache: KeyValueCache(cache.entries, [[2]]), "1 at real tokens"),
        (lambda cache: KeyValueCache(cache.entries, [[1]], frozen=1), "frozen"),  # type: ignore[arg-type]
        (lambda cache: setattr(cache[0], "past_keys", np.ones((3, 6, 4))), "past_keys are numbers"),
        (lambda cache: setattr(cache, "previous_attention_mask", [[0.5]]), "[batch, past]"),
        (lambda cache: cache.append_attention_mask([[1]]), "1 sequences"),
        (lambda cache: cache[0].append(np.ones((3, 1, 4, 31)), np.ones((3, 1, 4, 31))), "do not go after"),
        (lambda cache: KeyValueCache.init_cache(cache.config, batch_size=0), "batch_size"),
    ],
)
def test_what_is_no_cache_is_refused(make: Callable[[Any], Any], said: str) -> None:
    model = graphlens.HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    cache = filled(model)
    with pytest.raises(InputError, match=re.escape(said)):
        make(cache)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda cache: cache.entries.pop(), "3 entries"),
        (lambda cache: setattr(cache[1], "frozen", True), "entry 1 of the cache is frozen"),
        (lambda cache: setattr(cache[1], "past_keys", np.ones((3, 5, 4, 32), np.float32)), "layer 1"),
        (lambda cache: setattr(cache[1], "past_values", np.ones((3, 6, 4, 32))), "float64"),
        (lambda cache: setattr(cache[1], "past_values", np.ones((2, 6, 4, 32), np.float32)), "[2, 6, 4, 32]"),
        (lambda cache: cache.append_attention_mask(np.ones((3, 1), int)), "6 of 7 positions of layer 0"),
        (lambda cache: setattr(cache, "previous_attention_mask", np.ones((2, 6), int)), "2 sequences"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_run(spoil: Callable[[Any], Any], said: str) -> None:
    model = graphlens.HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    cache = filled(model)
    spoil(cache)
    with pytest.raises(InputError, match=re.escape(said)):
        continued(model, cache)
