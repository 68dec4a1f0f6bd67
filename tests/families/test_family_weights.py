"""The weights of every family under TransformerLens's names: views of the checkpoint that nothing is missing from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from graphlens.export.checkpoint import Checkpoint, read_checkpoint
from graphlens.export.families import weight_views
from graphlens.file.manifest import WeightView
from graphlens.file.safetensors import SafetensorsFile, WeightStore, apply_view, as_float, put_view
from tests.families.variants import VARIANTS

Folders = Callable[[str], Path]
# What TransformerLens keeps in a state_dict beside weights.
NO_WEIGHTS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")


class _Places(Mapping[str, tuple[str, str]]):
    """Where the parameters of a checkpoint lie, as its export would find them."""

    def __init__(self, checkpoint: Checkpoint, tied: bool) -> None:
        self._checkpoint, self._tied = checkpoint, tied

    def _key(self, parameter: str) -> str | None:
        keys = self._checkpoint.family.keys(parameter, self._tied)
        return next((key for key in keys if key in self._checkpoint.tensors), None)

    def __contains__(self, parameter: object) -> bool:
        return self._key(str(parameter)) is not None

    def __getitem__(self, parameter: str) -> tuple[str, str]:
        key = self._key(parameter)
        assert key is not None
        return self._checkpoint.tensors[key][0], key

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


def views_of(folder: Path) -> dict[str, WeightView]:
    """The weight views that an export of a checkpoint has."""
    checkpoint = read_checkpoint(folder)
    config = checkpoint.hf_config()
    spec = checkpoint.family.spec_of(config, folder.name)
    return weight_views(spec, _Places(checkpoint, checkpoint.is_tied(bool(config.tie_word_embeddings))))


@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].lens is not None])
def test_every_weight_is_transformerlenss(name: str, family_checkpoint: Folders) -> None:
    """One that has no view is all zeros, or all ones in a norm: TransformerLens fills it in."""
    from tests.families.lens import lens_of

    folder = family_checkpoint(name)
    ours = WeightStore(folder, views_of(folder))
    lens = lens_of(name, folder)
    theirs = {
        key.replace("attn._", "attn."): value.numpy()
        for key, value in lens.state_dict().items()
        if not key.endswith(NO_WEIGHTS)
    }
    if lens.cfg.positional_embedding_type == "alibi":
        del theirs["pos_embed.W_pos"]  # which it never reads
    assert not ours.keys() - theirs.keys()
    for key, weight in theirs.items():
        if key in ours:
            assert ours[key].shape == weight.shape, key
            np.testing.assert_allclose(ours[key], weight, rtol=1e-6, atol=1e-6, err_msg=key)
        else:
            filled = 1.0 if key.endswith(".w") else 0.0
            assert (weight == filled).all(), f"{key} has no view"


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_views_cover_every_tensor_of_the_checkpoint(name: str, family_checkpoint: Folders) -> None:
    """Each number of it is in a weight, and in one alone; but two norms may share a tensor, and ties do."""
    folder = family_checkpoint(name)
    views = views_of(folder)
    counts = {view.tensor: np.zeros(1) for view in views.values()}
    stored = {key: file for key, (file, _) in read_checkpoint(folder).tensors.items()}
    assert counts.keys() == stored.keys()
    for key, file in stored.items():
        counts[key] = np.zeros_like(as_float(SafetensorsFile(folder / file), key))
    for weight, view in views.items():
        marked = np.zeros_like(counts[view.tensor])
        put_view(marked, WeightView(**{**vars(view), "times": None, "plus": None}), np.ones(_shape(marked, view)))
        assert marked.any(), weight
        counts[view.tensor] += marked
    readers = dict.fromkeys(counts, 0)
    for weight, view in views.items():
        readers[view.tensor] += weight.endswith((".w", ".b", "W_E", "W_U", "W_tokens"))
    for key, count in counts.items():
        used = count[2:] if key.endswith("embed_positions.weight") else count  # OPT keeps two rows for padding
        assert (used == max(1, readers[key])).all(), f"{key}: {used.min()} to {used.max()}"


def _shape(array: np.ndarray, view: WeightView) -> tuple[int, ...]:
    """The shape of what a view takes."""
    return apply_view(array, view).shape
