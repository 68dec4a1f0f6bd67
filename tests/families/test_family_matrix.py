"""Every hook point of every family, read and edited, is TransformerLens 3.9's, or transformers' where that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from graphlens import HookedTransformer
from graphlens.export.checkpoint import read_checkpoint
from tests.families.comparing import TOLERANCE, Difference, against_lens, against_transformers, prompt
from tests.families.torch_hooks import against_torch_hooks
from tests.families.variants import CHOSEN, VARIANTS

Folders = Callable[[str], Path]


def assert_close(found: Iterable[Difference]) -> int:
    found = list(found)
    bad = [difference for difference in found if not difference.share <= TOLERANCE]
    assert not bad, bad
    return len(found)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_logits_are_transformers(name: str, family_model: Any, family_reference: Any) -> None:
    """On three shapes of input, and with padding on either side."""
    assert assert_close(against_transformers(family_model(name), family_reference(name))) == 5


@pytest.mark.parametrize("name", [name for name in CHOSEN if VARIANTS[name].lens is not None])
def test_every_hook_point_is_transformerlenss(name: str, family_model: Any, family_checkpoint: Folders) -> None:
    from tests.families.lens import lens_of

    ours: HookedTransformer = family_model(name)
    lens = lens_of(name, family_checkpoint(name))
    count = assert_close(against_lens(ours, lens, prompt(ours.cfg.d_vocab, 2, 11)))
    assert count == 1 + 2 * len(ours.hook_points())


@pytest.mark.parametrize("name", CHOSEN)
def test_what_torch_hooks_reach_is_transformers(
    name: str, family_model: Any, family_reference: Any, family_checkpoint: Folders
) -> None:
    ours: HookedTransformer = family_model(name)
    checkpoint = read_checkpoint(family_checkpoint(name))
    spec = checkpoint.family.spec_of(checkpoint.hf_config(), name)
    found = against_torch_hooks(ours, family_reference(name), spec, prompt(ours.cfg.d_vocab, 2, 11))
    assert assert_close(found) > 20 * ours.cfg.n_layers
