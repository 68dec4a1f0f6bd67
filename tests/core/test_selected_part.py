"""An operand has the axes of the part that is selected, as NumPy's ``x[selection] = value`` has it, whatever the sizes are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import Ablate, Patch, Scale, Steer, interventions
from graphlens.errors import InputError
from graphlens.interventions import Intervention
from tests.intervention_specs import close, feeds_of, plain_session
from tests.models import MODEL

CFG = MODEL.cfg
RESID, Z, PATTERN = "blocks.2.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"
POST = "blocks.1.mlp.hook_post"
ALL = slice(None)
# Four prompts, positions and heads; and every other way in which two of them are as many, or none.
SIZES = [(4, 4), (4, 7), (7, 4), (1, 4), (4, 1), (1, 1), (3, 5)]
# A hook point, a selection by field, the same as NumPy's index, and the axes of what it selects.
Case = tuple[str, dict[str, Any], tuple[Any, ...], str]
CASES: list[Case] = [
    (RESID, {"positions": -1}, (ALL, -1), "bd"),
    (RESID, {"positions": 0, "batch": 0}, (0, 0), "d"),
    (RESID, {"batch": -1}, (-1,), "pd"),
    (RESID, {"dims": 3}, (ALL, ALL, 3), "bp"),
    (RESID, {"positions": [-1]}, (ALL, [-1]), "b1d"),
    (RESID, {"positions": slice(None, 1)}, (ALL, slice(None, 1)), "b1d"),
    (Z, {"positions": -1}, (ALL, -1), "bhe"),
    (Z, {"heads": 2}, (ALL, ALL, 2), "bpe"),
    (Z, {"heads": 2, "positions": -1}, (ALL, -1, 2), "be"),
    (Z, {"heads": [3, 0]}, (ALL, ALL, [3, 0]), "bp2e"),
    (Z, {"heads": [True, False, False, True]}, (ALL, ALL, [0, 3]), "bp2e"),
    (Z, {"heads": 1, "dims": slice(0, 8)}, (ALL, ALL, 1, slice(0, 8)), "bp8"),
    (PATTERN, {"heads": 2}, (ALL, 2), "bpp"),
    (PATTERN, {"heads": 1, "positions": -1}, (ALL, 1, -1), "bp"),
    (PATTERN, {"positions": -1, "dims": 0}, (ALL, ALL, -1, 0), "bh"),
    (POST, {"dims": [5, 511], "positions": -1}, (ALL, -1, [5, 511]), "b2"),
]
OPERATIONS: dict[type[Any], Callable[[Any, Any], Any]] = {
    Patch: lambda x, value: value,
    Ablate: lambda x, value: value,
    Steer: lambda x, value: x + value,
    Scale: lambda x, value: x * value,
}


def prompts(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, CFG.d_vocab, (batch, length))


def value_for(axes: str, batch: int, length: int) -> np.ndarray:
    sizes = {"b": batch, "p": length, "h": CFG.n_heads, "e": CFG.d_head, "d": CFG.d_model}
    shape = [sizes[axis] if axis in sizes else int(axis) for axis in axes]
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def by_hook(tokens: np.ndarray, hook: str, index: tuple[Any, ...], change: Callable[[Any], Any]) -> np.ndarray:
    def edit(x: np.ndarray, hook: Any) -> None:
        x[index] = change(x[index])

    return MODEL.run_with_hooks(tokens, fwd_hooks=[(hook, edit)])


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize(("hook", "selection", "index", "axes"), CASES, ids=str)
def test_as_numpy_s_assignment(
    hook: str, selection: dict[str, Any], index: tuple[Any, ...], axes: str, kind: Any
) -> None:
    for batch, length in SIZES:
        tokens, value = prompts(batch, length), value_for(axes, batch, length)
        for operand in (value, value[..., :1], value[:1], value[(0,) * (value.ndim - 1)]):  # broadcast as NumPy's does
            expected = by_hook(tokens, hook, index, lambda x, operand=operand: OPERATIONS[kind](x, operand))
            close(MODEL.run_with_interventions(tokens, kind(hook, operand, **selection)), expected)
        assert np.abs(expected - MODEL(tokens)).max() > 1e-4


@pytest.mark.parametrize("length", [2, 5, 9])
def test_the_last_position_of_as_many_prompts_as_positions(length: int) -> None:
    """Each prompt gets its own row, and none of them that of the last position."""
    tokens, value = prompts(length, length), value_for("bd", length, length)
    found = MODEL.run_with_interventions(tokens, Patch("blocks.3.hook_resid_post", value, positions=-1))
    for row in range(length):
        alone = MODEL.run_with_interventions(
            tokens[row : row + 1], Patch("blocks.3.hook_resid_post", value[row], positions=-1)
        )
        close(found[row : row + 1], alone)


def test_a_mean_that_kept_its_axes_says_the_same_either_way() -> None:
    tokens, vector = prompts(4, 4), value_for("d", 4, 4)
    expected = MODEL.run_with_interventions(tokens, Patch(RESID, vector, positions=2))
    for kept in (vector[None], vector[None, None]):
        np.testing.assert_array_equal(MODEL.run_with_interventions(tokens, Patch(RESID, kept, positions=2)), expected)


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (RESID, {"positions": -1}, "bpd", "value[:, -1]"),
    (RESID, {"positions": 2}, "b1d", "value[:, 0]"),
    (RESID, {"positions": -1}, "1pd", "value[:, -1]"),
    (RESID, {"positions": -1}, "pd", "value[-1]"),
    (RESID, {"positions": [1, 3]}, "bpd", "value[:, [1, 3]]"),
    (RESID, {"positions": slice(2, None)}, "pd", "value[2:]"),
    (RESID, {"batch": 0}, "bpd", "value[0]"),
    (Z, {"heads": 2}, "he", "value[2]"),
    (Z, {"heads": 2}, "bphe", "value[:, :, 2]"),
    (Z, {"heads": [0, 3]}, "he", "value[[0, 3]]"),
    (POST, {"dims": slice(1, 3)}, "512", "value[1:3]"),
    (Z, {"heads": [0, 3], "positions": [1, 2]}, "bphe", "value[:, :, [0, 3]][:, [1, 2]]"),
]


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize(("hook", "selection", "axes", "instead"), REFUSED, ids=str)
def test_what_is_shaped_like_the_whole_activation_is_refused(
    hook: str, selection: dict[str, Any], axes: str, instead: str, kind: Any
) -> None:
    batch, length = 3, 7
    shape = (512,) if axes == "512" else value_for(axes, batch, length).shape
    item = kind(hook, np.ones(shape), **selection)
    with pytest.raises(InputError) as error:
        MODEL.run_with_interventions(prompts(batch, length), item)
    for part in (f"has shape {list(shape)}", "whose selected part is [", "Read as the whole activation, ["):
        assert part in str(error.value)
    assert instead.replace("value", kind.operand) in str(error.value)


def test_it_is_refused_before_a_run_where_the_axes_say_so() -> None:
    with (
        pytest.raises(InputError, match="it has 3 axes"),
        MODEL.intervene(Patch(RESID, np.zeros((1, 5, CFG.d_model)), positions=2)),
    ):
        pass


def test_a_mask_of_rows_and_positions_keeps_both_axes() -> None:
    tokens, value = prompts(3, 5), value_for("bpd", 3, 5)
    grid = np.random.default_rng(0).random((3, 5)) < 0.5

    def edit(x: np.ndarray, hook: Any) -> None:
        x[grid] = value[grid]

    found = MODEL.run_with_interventions(tokens, Patch(RESID, value, positions=grid))
    close(found, MODEL.run_with_hooks(tokens, fwd_hooks=[(RESID, edit)]))


@pytest.mark.parametrize(("hook", "selection", "index", "axes"), CASES, ids=str)
def test_the_same_from_a_file_and_in_one(
    hook: str, selection: dict[str, Any], index: tuple[Any, ...], axes: str, tmp_path: Path
) -> None:
    tokens, value = prompts(4, 4), value_for(axes, 4, 4)
    item: Intervention = Patch(hook, value, **selection)
    loaded = interventions.load(interventions.save(item, tmp_path / "edits.json"))
    assert loaded == [item]
    expected = MODEL.run_with_interventions(tokens, item)
    np.testing.assert_array_equal(MODEL.run_with_interventions(tokens, loaded), expected)
    session = plain_session(MODEL.bake(item, tmp_path / "out"))
    close(session.run(["logits"], {"input_ids": tokens})[0], expected)


def test_a_file_takes_no_value_for_each_position_that_is_generated(tmp_path: Path) -> None:
    item = Steer(RESID, np.ones((2, CFG.d_model)), positions="generated")
    with pytest.raises(InputError, match="depends on the length of the prompt"):
        MODEL.bake(item, tmp_path / "out", with_past=True)


@pytest.mark.parametrize("positions", ["prompt", np.ones((1, 3), bool)], ids=str)
def test_what_lies_beyond_a_file_s_values_stays_as_it_is(positions: Any, tmp_path: Path) -> None:
    tokens, value = prompts(1, 5), value_for("bpd", 1, 3)[0]
    session = plain_session(MODEL.bake(Patch(RESID, value, positions=positions), tmp_path / "out", with_past=True))
    expected = MODEL.run_with_interventions(tokens, Patch(RESID, value, positions=[0, 1, 2]))
    close(session.run(["logits"], feeds_of(session, tokens, CFG))[0], expected)


def test_two_prompts_of_two_tokens_and_two_heads() -> None:
    """Every size coincides: which axis is which is told by the selection alone."""
    tokens = np.asarray([[3, 1], [9, 2]])
    value = np.random.default_rng(0).normal(size=(2, 2, CFG.d_head)).astype(np.float32)
    for position, heads in ((0, [1, 3]), (1, [3, 1]), (-1, [0, 2])):

        def by_hand(z: np.ndarray, hook: object, at: int = position, which: list[int] = heads) -> None:
            z[:, at, which] = value

        expected = MODEL.run_with_hooks(tokens, fwd_hooks=[(Z, by_hand)])
        found = MODEL.run_with_interventions(tokens, Patch(Z, value, positions=position, heads=heads))
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())
