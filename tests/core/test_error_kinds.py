"""What is raised is a GraphlensError, and of the built-in kind that its meaning has: either can be caught."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import FactoredMatrix, HookedTransformer, KeyValueCache, errors, patching, utils

TOKENS = [[1, 2, 3, 4]]
# As docs/parity.md says.
KINDS: dict[str, tuple[type[Exception], ...]] = {
    "GraphlensError": (),
    "UnknownHookPoint": (KeyError,),
    "InputError": (ValueError,),
    "InputTypeError": (ValueError, TypeError),
    "InputKeyError": (ValueError, KeyError),
    "InputIndexError": (ValueError, IndexError),
    "InputAttributeError": (ValueError, AttributeError),
    "StateDictError": (ValueError, RuntimeError),
    "InputShapeError": (ValueError, RuntimeError),
    "HookResultError": (ValueError,),
    "ModelFileError": (ValueError,),
    "ExportError": (ValueError,),
    "VerificationError": (ValueError, RuntimeError),
    "RunError": (RuntimeError,),
    "RuntimeUnavailable": (ImportError,),
}
BUILT_IN = (
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    RuntimeError,
    ImportError,
    AssertionError,
    OSError,
    AttributeError,
)


def test_each_error_is_of_the_kinds_it_says() -> None:
    found = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert found.keys() == KINDS.keys()
    for name, kind in found.items():
        assert issubclass(kind, errors.GraphlensError)
        assert {one for one in BUILT_IN if issubclass(kind, one)} == set(KINDS[name]), name
        raised = kind(f"{name}: 'a name'")
        assert str(raised) == f"{name}: 'a name'"
        assert str(pickle.loads(pickle.dumps(raised))) == str(raised)


def test_parity_md_says_the_same() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
    for name, kinds in KINDS.items():
        if kinds:
            assert f"| `{name}` | {', '.join(kind.__name__ for kind in kinds)} |" in text


MATRIX = FactoredMatrix(np.ones((2, 5, 3)), np.ones((2, 3, 4)))
Call = Callable[[HookedTransformer], object]
RAISED: list[tuple[str, Call, tuple[type[Exception], ...]]] = [
    ("a hook name", lambda m: m.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_nothing", print)]), (KeyError,)),
    ("a filter", lambda m: m.run_with_cache(TOKENS, names_filter="hook_nothing"), (KeyError,)),
    ("a cached name", lambda m: m.run_with_cache(TOKENS, names_filter="hook_embed")[1]["z", 0], (KeyError,)),
    ("a layer beyond", lambda m: m.run_with_cache(TOKENS)[1]["z", 99], (KeyError,)),
    (
        "a scale that was left out",
        lambda m: m.run_with_cache(TOKENS, names_filter="hook_embed")[1].apply_ln_to_stack(np.ones((1, 4, 128))),
        (KeyError,),
    ),
    ("a hook that is none", lambda m: m.add_hook("hook_embed", 3), (TypeError, ValueError)),
    ("no direction", lambda m: m.add_hook("hook_embed", print, dir="up"), (ValueError,)),
    ("a shape of tokens", lambda m: m(np.zeros((1, 2, 3), int)), (ValueError,)),
    ("a token beyond", lambda m: m([[10**6]]), (ValueError,)),
    ("text of two tokens", lambda m: m.to_single_token(" the store"), (ValueError,)),
    ("a mode of composition", lambda m: m.all_composition_scores("X"), (ValueError,)),
    ("a mode of position", lambda m: m.get_token_position(5, TOKENS[0], mode="middle"), (ValueError,)),
    ("a slice", lambda m: utils.Slice("x"), (ValueError,)),
    ("beyond a slice", lambda m: utils.Slice(7).apply(np.ones(3)), (IndexError, ValueError)),
    ("no max_ctx", lambda m: utils.Slice([1]).indices(), (ValueError,)),
    ("factors", lambda m: FactoredMatrix(np.ones((9, 5, 3)), np.ones((2, 4, 3, 7))), (RuntimeError, ValueError)),
    ("an inner dimension", lambda m: MATRIX @ np.ones((5, 4)), (RuntimeError, ValueError)),
    ("leading axes", lambda m: MATRIX @ np.ones((3, 4, 5)), (RuntimeError, ValueError)),
    (
        "leading axes of factors",
        lambda m: MATRIX.T @ FactoredMatrix(np.ones((3, 5, 2)), np.ones((3, 2, 2))),
        (RuntimeError,),
    ),
    ("no square", lambda m: MATRIX.eigenvalues, (ValueError,)),
    ("a matrix as a number", lambda m: MATRIX * np.ones(2), (ValueError,)),
    ("beyond a matrix", lambda m: MATRIX[5], (IndexError, ValueError)),
    ("too long an index", lambda m: MATRIX[0, 0, 0, 0], (IndexError, ValueError)),
    (
        "a batch of another size",
        lambda m: m(TOKENS, past_kv_cache=KeyValueCache.init_cache(m.cfg, None, 2)),
        (ValueError,),
    ),
    ("no entries", lambda m: KeyValueCache([3], [[1]]), (TypeError, ValueError)),  # type: ignore[list-item]
    ("a head", lambda m: utils.detect_head(m, "a b c", "nose_head"), (ValueError,)),
    ("a pattern", lambda m: utils.detect_head(m, "a b c", np.ones((4, 4))), (ValueError,)),
    ("a cache of several", lambda m: utils.detect_head(m, ["a b"], "induction_head", cache={}), (ValueError,)),
    (
        "no indices",
        lambda m: patching.generic_activation_patch(m, TOKENS, {}, len, patching.layer_pos_patch_setter, "z"),
        (ValueError,),
    ),
    ("a folder that is none", lambda m: HookedTransformer.from_onnx("/nowhere/at/all"), (ValueError,)),
]


@pytest.mark.parametrize(("call", "kinds"), [row[1:] for row in RAISED], ids=[row[0] for row in RAISED])
def test_it_is_caught_by_its_kind_and_as_ours(tiny: HookedTransformer, call: Call, kinds: tuple[Any, ...]) -> None:
    for kind in (*kinds, errors.GraphlensError):
        with pytest.raises(kind) as caught:
            call(tiny)
        assert isinstance(caught.value, errors.GraphlensError)
        assert len(str(caught.value)) > 20
        assert not isinstance(caught.value, AssertionError)
