"""Hook calls, arguments of runs and texts, as users get them wrong: each a clean error, or the number of the plain file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.hostile import spec_edits
from tests.hostile.cases import Place
from tests.hostile.truth import Array, Truth, differs, log_softmax


class MineError(Exception):
    """What a hook of the user's raises; it must come back as it is."""


# Hooks


def _raises(x: Array, hook: Any) -> Array:
    raise MineError("mine")


def _exits(x: Array, hook: Any) -> Array:
    raise SystemExit(3)


def _in_place(x: Array, hook: Any) -> None:
    x[..., :1] = 0


def _zeroed(x: Array) -> Array:
    y = x.copy()
    y[..., :1] = 0
    return y


Hook = Callable[..., Any]
# name -> (the hook, what it makes of an activation; None where its result must be refused). Masked scores are -inf: times 0
# they would be NaN.
HOOKS: dict[str, tuple[Hook, Callable[[Array], Array] | None]] = {
    "nothing": (lambda x, hook: None, lambda x: x),
    "same": (lambda x, hook: x, lambda x: x),
    "copy": (lambda x, hook: x.copy(), lambda x: x),
    "zero": (lambda x, hook: np.zeros_like(x), lambda x: np.zeros_like(x)),
    "first": (lambda x, hook: _zeroed(x), _zeroed),
    "in place": (_in_place, _zeroed),
    "float64": (lambda x, hook: (x * 2).astype(np.float64), None),
    "float16": (lambda x, hook: x.astype(np.float16), None),
    "int": (lambda x, hook: x.astype(np.int64), None),
    "bool": (lambda x, hook: x > 0, None),
    "complex": (lambda x, hook: x * 1j, None),
    "object": (lambda x, hook: x.astype(object), None),
    "list": (lambda x, hook: x.tolist(), None),
    "text": (lambda x, hook: "text", None),
    "number": (lambda x, hook: 0.0, None),
    "true": (lambda x, hook: True, None),
    "empty": (lambda x, hook: x[:0], None),
    "one row": (lambda x, hook: x[:1], None),
    "one axis more": (lambda x, hook: x[None], None),
    "one axis less": (lambda x, hook: x[0], None),
    "transposed": (lambda x, hook: x.swapaxes(0, 1), None),
    "bigger": (lambda x, hook: np.concatenate([x, x]), None),
    "reversed twice": (lambda x, hook: x[:, ::-1][:, ::-1], lambda x: x),
    "fortran": (lambda x, hook: np.asfortranarray(x), lambda x: x),
    "other endian": (lambda x, hook: x.astype(x.dtype.newbyteorder(">")), None),
    "read-only": (lambda x, hook: np.broadcast_to(np.zeros((), x.dtype), x.shape), lambda x: np.zeros_like(x)),
    "masked": (lambda x, hook: np.ma.masked_array(np.zeros_like(x)), lambda x: np.zeros_like(x)),
    "generator": (lambda x, hook: (row for row in x), None),
    "pair": (lambda x, hook: (x, x), None),
    "function": (lambda x, hook: print, None),
    "raises": (_raises, None),
    "exits": (_exits, None),
    "default": (lambda x, hook=None: np.zeros_like(x), lambda x: np.zeros_like(x)),
    "partial": (functools.partial(lambda more, x, hook: np.full_like(x, more), 0), lambda x: np.zeros_like(x)),
}  # fmt: skip
NAN = {
    "nan": (lambda x, hook: x * np.nan),
    "infinite": (lambda x, hook: x + np.inf),
}  # a user's own; only no crash is owed
NOT_CALLABLE = (None, 7, "zero", [], {})
BAD_PAIRS = (
    None,
    7,
    "hook_embed",
    ["hook_embed"],
    [("hook_embed",)],
    [("hook_embed", None, None)],
    {"hook_embed": print},
    [7],
    [[]],
    print,
)


@st.composite
def hook_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Tokens, and hooks at one hook point."""
    name = draw(st.sampled_from([*spec_edits.HOOKS, *spec_edits.HOOKS, *filter(None, spec_edits.BAD_HOOKS)]))
    kinds = st.sampled_from([*HOOKS, *HOOKS, *NAN, *("not callable",) * 3])
    return {
        "seed": draw(st.integers(0, 99)),
        "batch": draw(st.integers(1, 3)),
        "length": draw(st.integers(1, 7)),
        "name": name,
        "hooks": draw(st.lists(kinds, min_size=1, max_size=2)),
        "not callable": draw(st.sampled_from(NOT_CALLABLE)),
        "pairs": draw(st.sampled_from([None] * 12 + [*BAD_PAIRS])),
        "by": draw(st.sampled_from(["run_with_hooks", "hooks", "add_hook"])),
        "id": draw(st.sampled_from([None, None, -1, 800, 2**40, 5])),
    }


def _hook_of(spec: dict[str, Any], name: str) -> Any:
    if name == "not callable":
        return spec["not callable"]
    return NAN[name] if name in NAN else HOOKS[name][0]


def run_hooks(warm: Any, spec: dict[str, Any], _: Place) -> list[str]:
    """Runs with hooks, and compares the logits; afterwards the model must be as it was."""
    tokens = spec_edits.tokens_of(spec, warm.truth)
    hooks = [_hook_of(spec, name) for name in spec["hooks"]]
    if spec["name"] == "hook_tokens" and spec["id"] is not None:
        hooks = [lambda x, hook: np.full_like(x, spec["id"])]
    found, raised = None, None
    try:
        found = _run(warm.model, spec, tokens, hooks)
    except (MineError, SystemExit) as error:
        raised = error
    finally:
        warm.model.reset_hooks()
    wrong = differs(warm.model(tokens), warm.truth.run(tokens)[0], "logits of the run after it")
    if raised is not None:
        mine = {"raises", "exits"} & set(spec["hooks"])
        return wrong if mine else [*wrong, f"{raised!r} from nowhere"]
    if set(spec["hooks"]) & set(NAN):
        return wrong
    right = _right(warm.truth, spec, tokens)
    if right is None:
        return [*wrong, "it ran, where an error is owed"]
    return wrong + differs(found, right, "logits")


def _run(model: Any, spec: dict[str, Any], tokens: Array, hooks: list[Any]) -> Array:
    pairs: Any = [(spec["name"], hook) for hook in hooks] if spec["pairs"] is None else spec["pairs"]
    if spec["by"] == "run_with_hooks" or spec["pairs"] is not None:
        found: Array = model.run_with_hooks(tokens, fwd_hooks=pairs)
        return found
    if spec["by"] == "hooks":
        with model.hooks(fwd_hooks=pairs):
            found = model(tokens)
        return found
    for name, hook in pairs:
        model.add_hook(name, hook)
    found = model(tokens)
    return found


def _right(truth: Truth, spec: dict[str, Any], tokens: Array) -> Array | None:
    """The logits under the hooks; None where an error is owed."""
    name = spec["name"]
    if spec["pairs"] is not None or not isinstance(name, str) or name not in truth.values:
        return None
    x = truth.run(tokens, [name])[0] if name != "hook_tokens" else tokens
    if name == "hook_tokens" and spec["id"] is not None:
        return None if not 0 <= spec["id"] < truth.vocabulary else truth.run(np.full_like(tokens, spec["id"]))[0]
    for kind in spec["hooks"]:
        made = HOOKS[kind][1] if kind in HOOKS else None
        if made is not None:
            x = made(x)
            continue
        # Some of these are no fault where the activation happens to be of that dtype or shape already.
        refused = kind not in HOOKS or not _is_like(HOOKS[kind][0], x)
        if refused:
            return None
        x = HOOKS[kind][0](x, None)
    return truth.with_value(tokens, name, np.asarray(x))


def _is_like(hook: Hook, x: Array) -> bool:
    """True if what a hook makes of an activation has its dtype and shape after all."""
    try:
        made = hook(x, None)
    except (MineError, SystemExit, TypeError, np.exceptions.AxisError, IndexError):
        return False
    return type(made) is np.ndarray and made.dtype == x.dtype and made.dtype.isnative and made.shape == x.shape


# Arguments of runs

BAD_TOKENS = (
    None, 7, 7.0, b"text", [], [[]], [[], []], [[1], [1, 2]], [[1.5]], [[1.0]], [["1"]], [[True]], [[None]], {}, {1},
    object(), lambda: 0,
    [[800]], [[-1]], [[2**40]], [[2**63]], [[2**70]], np.zeros((1, 0), int), np.zeros((0, 3), int), np.zeros((1, 1, 1), int),
    np.zeros((2, 3)), np.array([["a"]]), np.array([[1, 2]], object), np.array(3), np.zeros((1, 129), int), np.zeros((1,
    100_000), int),
    np.full((1, 2), np.nan), np.array([[1 + 1j]]), np.ma.masked_array([[1, 2]], [[0, 1]]), range(5), (1, 2, 3), [1, 2,
    3], [(1, 2)],
    iter([1, 2]), np.array([[1, 2]], np.uint8), np.array([[1, 2]], ">i4"), np.array([[200, 2]], np.uint64), [[np.int8(3)]],
    [["a", "b"]], ["a", None], ["a", 7], ["a", b"b"], [""], "", np.array([[799]], np.int16), np.zeros((100_000, 1),
    int)[:300],
)  # fmt: skip
BAD_LAYERS = (1.5, "1", 99, -99, True, None, [1], 2**70, float("nan"), np.float32(2), np.int64(1), 0, 1, 4, -1)
BAD_FILTERS = ("nothing", "", "hook_embed", ["hook_embed"], [], [7], 7, lambda name: "embed" in name,

               {"hook_embed"}, ("hook_embed",), None, [None], "*", b"hook_embed", {"hook_embed": 1}, True)  # fmt: skip
BAD_SLICES = (
    None,
    0,
    -1,
    99,
    -99,
    1.5,
    "0",
    slice(0, 1),
    slice(0, 1, 0),
    slice(5, 2),
    [0],
    [0, 99],
    [],
    True,
    [[0]],
    slice("a"),
    2**70,
)
BAD_MASKS = (None, 1, "1", [[1]], [[2]], [[1, 1, 1]], np.zeros((1, 3), int), np.ones((1, 3)), np.ones((1, 3), bool),
np.ones((3, 1), int),
             np.full((1, 3), np.nan), [[1], [1, 1]], np.ones((1, 2, 3)), [[-1, 1, 1]], object(), [[0, 1, 1]])  # fmt: skip
GENERATE = {
    "max_new_tokens": (0, 1, 3, -1, 2.0, 2.5, "2", None, True, float("nan"), 2**70, np.int64(2), 200, [2]),
    "temperature": (0, 0.0, 1.0, -1.0, float("nan"), float("inf"), "1", None, 1e-300, [1.0], True),
    "top_k": (None, 1, 0, -1, 2.5, 2.0, "1", True, 10**9, float("nan"), np.int64(1)),
    "top_p": (None, 1.0, 0.5, 0.0, -0.5, 1.5, float("nan"), "0.5", True),
    "freq_penalty": (0.0, 1.0, float("nan"), float("inf"), "0", None, -1.0),
    "eos_token_id": (None, 0, -1, 800, [0, 1], [], "0", 1.5, [None], 2**70),
    "seed": (None, 0, -1, 1.5, "0", 2**70, [0]),
    "return_type": ("input", "tokens", "str", None, "nonsense", 7),
    "padding_side": (None, "left", "right", "middle", 7, True),
    "prepend_bos": (None, True, False, 0, 1, "yes", []),
}


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """A method, its input, and one or two arguments that may be no good."""
    method = draw(
        st.sampled_from(["forward", "run_with_cache", "generate", "to_tokens", "to_string", "loss", "gradients"])
    )
    good = draw(st.booleans())
    input = [[5, 6, 7]] if good else draw(st.sampled_from(BAD_TOKENS))
    options: dict[str, Any] = {}
    if method in ("forward", "run_with_cache") and draw(st.booleans()):
        options["stop_at_layer"] = draw(st.sampled_from(BAD_LAYERS))
    if method in ("forward", "run_with_cache", "loss") and draw(st.integers(0, 3)) == 0:
        options["attention_mask"] = draw(st.sampled_from(BAD_MASKS))
    if method == "run_with_cache":
        options["names_filter"] = draw(st.sampled_from(BAD_FILTERS))
        if draw(st.booleans()):
            options["pos_slice"] = draw(st.sampled_from(BAD_SLICES))
    if method == "forward" and draw(st.integers(0, 3)) == 0:
        options["return_type"] = draw(st.sampled_from([None, "logits", "nonsense", 7, True, ["logits"], {}]))
    if method == "generate":
        for name in draw(st.lists(st.sampled_from(sorted(GENERATE)), max_size=2, unique=True)):
            options[name] = draw(st.sampled_from(GENERATE[name]))
    return {"method": method, "input": input, "options": options}


def run_arguments(warm: Any, spec: dict[str, Any], _: Place) -> list[str]:
    """Calls a method, and compares what it gives where the plain file can say it."""
    method, input, options = spec["method"], spec["input"], spec["options"]
    model = warm.model
    if method == "generate":
        return _generated(warm, input, {"do_sample": False, "verbose": False, "max_new_tokens": 3, **options})
    if method == "loss":
        return _loss(warm, model.forward(input, return_type="loss", **options), input, options)
    if method == "gradients":
        from graphlens.metrics import LogitDiff

        model.gradients(input, LogitDiff(3, 5), "hook_embed")
        is_text = isinstance(input, list) and all(isinstance(text, str) for text in input)
        return [] if is_text or tokens_given(input, warm.truth) is not None else ["it ran on what are no tokens"]
    if method in ("to_tokens", "to_string"):
        getattr(model, method)(input)
        return []
    found = getattr(model, method)(input, **options)
    return _run_right(warm.truth, found, input, options, method)


def tokens_given(input: Any, truth: Truth) -> Array | None:
    """The tokens that an input stands for, None if it is none."""
    if isinstance(input, str):
        return np.asarray([truth.ids(input)])
    try:
        array = np.asarray(list(input) if isinstance(input, range | tuple) else input)
    except ValueError:
        return None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        return None
    array = np.atleast_2d(array)
    if not (int(array.min()) >= 0 and int(array.max()) < truth.vocabulary) or array.shape[1] > 128:
        return None
    return array.astype(np.int64)


def _run_right(truth: Truth, found: Any, input: Any, options: dict[str, Any], method: str) -> list[str]:
    """What is wrong with a run that gave something."""
    if isinstance(input, list) and input and isinstance(input[0], str):
        return [] if all(isinstance(text, str) for text in input) else ["it ran on what is no text"]
    tokens = tokens_given(input, truth)
    if tokens is None:
        return ["it ran on what are no tokens"]
    if options.get("attention_mask") is not None or options.get("return_type", "logits") != "logits":
        return []  # of other numbers; TransformerLens's own tests and tests/parity know them
    stop = options.get("stop_at_layer")
    logits = found[0] if method == "run_with_cache" else found
    if stop is None:
        wrong = differs(logits, truth.run(tokens)[0], "logits")
    elif isinstance(stop, int | np.integer) and not isinstance(stop, bool) and -4 <= stop <= 4:
        layer = int(stop) % 4 if stop != 4 else 4
        name = "blocks.3.hook_resid_post" if layer == 4 else f"blocks.{layer}.hook_resid_pre"
        wrong = differs(logits, truth.run(tokens, [name])[0], name)
    else:
        return [f"it ran with stop_at_layer={stop!r}"]
    if method == "run_with_cache" and options.get("pos_slice") is None and stop is None:
        cache = found[1]
        wrong += [
            line for name in list(cache)[:20] for line in differs(cache[name], truth.run(tokens, [name])[0], name)
        ]
    return wrong


def _loss(warm: Any, found: Any, input: Any, options: dict[str, Any]) -> list[str]:
    if options.get("attention_mask") is not None or not isinstance(input, list | np.ndarray):
        return []
    tokens = tokens_given(input, warm.truth)
    if tokens is None:
        return (
            [] if isinstance(input, list) and all(isinstance(text, str) for text in input) else ["a loss of no tokens"]
        )
    chosen = np.take_along_axis(log_softmax(warm.truth.run(tokens)[0])[:, :-1], tokens[:, 1:, None], -1)
    return differs(np.asarray(found, np.float32), np.asarray(-chosen.mean(), np.float32), "loss")


def _generated(warm: Any, input: Any, options: dict[str, Any]) -> list[str]:
    found = warm.model.generate(input, **options)
    wanted = {"max_new_tokens": int, "temperature": float, "freq_penalty": float, "top_k": int, "top_p": float}
    wrong = []
    for name, kind in wanted.items():
        value = options.get(name)
        if value is None and name in ("top_k", "top_p"):
            continue
        if name in options and not _is_a(value, kind):
            wrong.append(f"it ran with {name}={value!r}")
    tokens = tokens_given(input, warm.truth)
    changed = set(options) - {"do_sample", "verbose", "max_new_tokens", "seed", "temperature", "top_k", "top_p"}
    if wrong or tokens is None or changed or len(tokens) > 1 or not isinstance(found, np.ndarray):
        return wrong
    ids = tokens
    for _ in range(int(options["max_new_tokens"])):
        ids = np.concatenate([ids, warm.truth.run(ids)[0][:, -1:].argmax(-1)], 1)
        if ids[0, -1] == 0:
            break
    return differs(found, ids, "generated tokens")


def _is_a(value: Any, kind: type) -> bool:
    """True if an argument is of a kind that makes sense: no bool, no fraction for a count, nothing that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    return bool(np.isfinite(float(value))) and (kind is float or isinstance(value, int | np.integer))


# Texts

TEXTS = (
    "", " ", "\0", "a\0b", "\ud800", "a\udfffb", "\ud83d\ude00", "\U0001f600", "\ufeff", "é" * 50, "e\u0301", "<|endoftext|>",
    "<|endoftext|>" * 200, "\x1b[31m", "a" * 2000, "a" * 200_000, "\n" * 500, "\u202e", "\U0010ffff", "\ufffe",
    "[bold]", "{x}", "%s", "-",
    "--help", "名前", "नमस्ते", "\r\n\t", "a b", "１",
)  # fmt: skip
NO_TEXTS = (
    None,
    7,
    b"a",
    [None],
    ["a", None],
    [b"a"],
    ["a", 7],
    [["a"]],
    {"a": 1},
    ("a", "b"),
    ["a"] * 3,
    [],
    ["a", ""],
    iter(["a"]),
    ["\ud800"],
)


@st.composite
def texts(draw: st.DrawFn) -> dict[str, Any]:
    """A text, or what is none, and the method that gets it."""
    kind = draw(st.sampled_from(["text"] * 4 + ["listed"] * 3 + ["any", "none", "none"]))
    methods = [
        "to_tokens",
        "to_str_tokens",
        "forward",
        "to_single_token",
        "run_with_cache",
        "get_token_position",
        "test_prompt",
    ]
    text: Any = draw(st.sampled_from(TEXTS))
    if kind == "any":
        text = draw(st.text(max_size=40))
    if kind == "listed":
        text = [text, draw(st.sampled_from(TEXTS))]
    if kind == "none":
        text = draw(st.sampled_from(NO_TEXTS))
    return {
        "text": text,
        "method": draw(st.sampled_from([*["to_tokens"] * 4, *methods])),
        "bos": draw(st.sampled_from([None, True, False])),
    }


def run_text(warm: Any, spec: dict[str, Any], _: Place) -> list[str]:
    """Calls a method with a text, and compares the tokens with those of the tokenizers package."""
    text, method, model = spec["text"], spec["method"], warm.model
    if method == "to_tokens":
        found = model.to_tokens(text, prepend_bos=spec["bos"])
        return _tokens_right(warm.truth, found, text, spec["bos"])
    if method == "get_token_position":
        model.get_token_position(text, "a b c")
        return []
    if method == "test_prompt":
        model.test_prompt(text, " b")
        return []
    found = getattr(model, method)(text)
    if method == "forward" and isinstance(text, str):
        ids = np.asarray([warm.truth.ids(text)[:128]])
        return differs(found, warm.truth.run(ids)[0], "logits")
    return []


def _tokens_right(truth: Truth, found: Array, text: Any, bos: bool | None) -> list[str]:
    if not isinstance(text, str):
        return (
            []
            if isinstance(text, list | tuple) and all(isinstance(each, str) for each in text)
            else ["tokens of no text"]
        )
    ids = truth.ids(text)[0 if bos is not False else 1 :]
    return differs(found, np.asarray([ids[: found.shape[1]]], np.int64), "tokens") + (
        [] if len(ids) == found.shape[1] or found.shape[1] == 128 else [f"{found.shape[1]} tokens of {len(ids)}"]
    )
