"""Values of the wrong kind: whatever a call is given, what it raises is a sentence of graphlens's own.

A TypeError is allowed where Python itself gives one: for an argument that a function does not have.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer, interventions, surgery
from graphlens.attribution import attribution_patch
from graphlens.errors import ExportError, GraphlensError, InputError, ModelFileError, UnknownHookPoint
from graphlens.export.checkpoint import supported_family
from graphlens.file.manifest import Manifest
from graphlens.file.tokenizer import Tokenizer, load_tokenizer
from graphlens.metrics import LogitDiff
from graphlens.patching import SweepResult, act_patch_sites, sweep
from graphlens.utils import get_act_name

WRONG: dict[str, Any] = {
    "None": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus": -1,
    "huge": 10**30,
    "too wide": 2**63,
    "fraction": 1.5,
    "bytes": b"x",
    "text": "no such thing",
    "surrogate": "a\udcff",
    "null": "\0",
    "long": "x" * 300,
    "empty": [],
    "dict": {"a": 1},
    "set": {1},
    "ragged": [[[1], [2, 3]]],
    "list of None": [None, "a"],
    "object": object(),
    "array": np.zeros((2, 3)),
    "objects": np.array([None, 1], dtype=object),
    "complex": 1j,
    "generator": (None for _ in ()),
}
PROMPT = "When John and Mary"
TOKENS = np.asarray([[1, 2, 3, 4]])
HOOK = "blocks.0.attn.hook_z"


def small(model: HookedTransformer) -> Tokenizer:
    """The model's tokenizer without transformers, whose own raise what they like."""
    found = load_tokenizer(model.runner.engine.folder)
    assert found is not None
    return found


def keep(activation: np.ndarray, hook: Any) -> None:
    """A hook that changes nothing."""


Call = Callable[[HookedTransformer, Any], object]
CALLS: dict[str, Call] = {
    "forward": lambda m, x: m(x),
    "return_type": lambda m, x: m(TOKENS, return_type=x),
    "loss_per_token": lambda m, x: m(TOKENS, return_type="loss", loss_per_token=x),
    "prepend_bos": lambda m, x: m(PROMPT, prepend_bos=x),
    "padding_side": lambda m, x: m(PROMPT, padding_side=x),
    "attention_mask": lambda m, x: m(TOKENS, attention_mask=x),
    "past_kv_cache": lambda m, x: m(TOKENS, past_kv_cache=x),
    "residual": lambda m, x: m(x, start_at_layer=1),
    "names_filter": lambda m, x: m.run_with_cache(TOKENS, names_filter=x),
    "remove_batch_dim": lambda m, x: m.run_with_cache(TOKENS, names_filter="hook_embed", remove_batch_dim=x),
    "incl_bwd": lambda m, x: m.run_with_cache(TOKENS, "loss", names_filter="hook_embed", incl_bwd=x),
    "clear_contexts": lambda m, x: m.run_with_cache(TOKENS, names_filter="hook_embed", clear_contexts=x),
    "return_cache_object": lambda m, x: m.run_with_cache(TOKENS, names_filter="hook_embed", return_cache_object=x),
    "fwd_hooks": lambda m, x: m.run_with_hooks(TOKENS, fwd_hooks=x),
    "a pair": lambda m, x: m.run_with_hooks(TOKENS, fwd_hooks=[x]),
    "a hook's name": lambda m, x: m.run_with_hooks(TOKENS, fwd_hooks=[(x, keep)]),
    "reset_hooks_end": lambda m, x: m.run_with_hooks(TOKENS, reset_hooks_end=x),
    "dir": lambda m, x: m.add_hook(HOOK, keep, dir=x),
    "direction": lambda m, x: m.reset_hooks(direction=x),
    "level": lambda m, x: m.reset_hooks(level=x),
    "interventions": lambda m, x: m.run_with_interventions(TOKENS, x),
    "strict": lambda m, x: m.run_with_interventions(TOKENS, [], strict=x),
    "flag": lambda m, x: (m.set_use_hook_mlp_in(x), m.set_use_hook_mlp_in(False)),
    "key of a cache": lambda m, x: m.run_with_cache(TOKENS, names_filter="hook_embed")[1][x],
    "layer of a cache": lambda m, x: m.run_with_cache(TOKENS, names_filter="hook_embed")[1]["z", x],
    "to_tokens": lambda m, x: m.to_tokens(x),
    "to_single_token": lambda m, x: m.to_single_token(x),
    "to_str_tokens": lambda m, x: m.to_str_tokens(x),
    "to_string": lambda m, x: m.to_string(x),
    "to_single_str_token": lambda m, x: m.to_single_str_token(x),
    "tokens_to_residual_directions": lambda m, x: m.tokens_to_residual_directions(x),
    "get_token_position": lambda m, x: m.get_token_position(x, PROMPT),
    "position in": lambda m, x: m.get_token_position(5, x),
    "mode": lambda m, x: m.get_token_position(5, PROMPT, mode=x),
    "set_tokenizer": lambda m, x: m.set_tokenizer(x),
    "answer": lambda m, x: m.test_prompt(PROMPT, x, top_k=1),
    "tokenizer.encode": lambda m, x: small(m).encode(x),
    "tokenizer.decode": lambda m, x: small(m).decode(x),
    "tokenizer.batch_decode": lambda m, x: small(m).batch_decode(x),
    "tokenizer": lambda m, x: small(m)(x),
    "from_onnx": lambda m, x: HookedTransformer.from_onnx(x),
    "n_ctx": lambda m, x: HookedTransformer.from_onnx(m.runner.engine.path, "cpu", n_ctx=x),
    "default_padding_side": lambda m, x: HookedTransformer.from_onnx(
        m.runner.engine.path, "cpu", default_padding_side=x
    ),
    "interventions.load": lambda m, x: interventions.load(x),
    "interventions.from_json": lambda m, x: interventions.from_json(x),
    "interventions.to_json": lambda m, x: interventions.to_json(x),
    "SweepResult.load": lambda m, x: SweepResult.load(x),
    "sites": lambda m, x: sweep(m, TOKENS, x, "zero", LogitDiff(5, 7), verbose=False),
    "source": lambda m, x: sweep(m, TOKENS, act_patch_sites(m, TOKENS, "resid_pre"), x, LogitDiff(5, 7), verbose=False),
    "name of sites": lambda m, x: act_patch_sites(m, TOKENS, x),
    "labels of sites": lambda m, x: act_patch_sites(m, TOKENS, "resid_pre", x),
    **{
        f"{kind.__name__}.{field}": lambda m, x, kind=kind, given=given, field=field: m.run_with_interventions(
            TOKENS, kind(**{"hook": HOOK, given: 1.0, field: x})
        )
        for kind, given in ((Ablate, "value"), (Patch, "value"), (Steer, "vector"), (Scale, "factor"))
        for field in ("hook", given, "heads", "positions", "dims", "batch", "strict", "allow_nonfinite")
    },
    "Steer.coefficient": lambda m, x: m.run_with_interventions(TOKENS, Steer(HOOK, 1.0, coefficient=x)),
}


@pytest.fixture
def model(tiny: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HookedTransformer:
    """The embedded model, in a working folder of the test's own, so that a path that is taken leads nowhere else."""
    monkeypatch.chdir(tmp_path)
    return tiny


def answer(call: Call, model: HookedTransformer, value: Any) -> Exception | None:
    """What a call raises; None for a result."""
    try:
        call(model, value)
    except Exception as error:  # noqa: BLE001  # the test looks at every kind
        return error
    return None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("call", CALLS)
def test_whatever_is_given_the_answer_is_a_result_or_a_sentence(
    call: str, model: HookedTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = model.tokenizer
    try:
        answers = {what: answer(CALLS[call], model, value) for what, value in WRONG.items()}
    finally:
        model.tokenizer = tokenizer
        model.reset_hooks(including_permanent=True)
    refused = {what: error for what, error in answers.items() if error is not None}
    assert refused
    for what, error in refused.items():
        # These two pass for Python's own: a list that holds something else than names or functions.
        own = isinstance(error, TypeError) and str(error).startswith(("names_filter must", "the hook at"))
        assert isinstance(error, GraphlensError) or own, (what, error)
        assert len(str(error)) < 700, what
    assert not list(tmp_path.iterdir())


def test_what_is_no_name_is_in_no_cache(tiny: HookedTransformer) -> None:
    _, cache = tiny.run_with_cache(TOKENS, names_filter="hook_embed")
    assert "hook_embed" in cache
    for what, value in WRONG.items():
        assert value not in cache, what
        assert ("z", value) not in cache, what


# What the sentences say


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda m: m.run_with_cache("x", name_filter="hook_embed"),
            r"^run_with_cache\(\) has no argument 'name_filter': did you mean names_filter\?",
        ),
        (lambda m: m.run_with_cache("x", runner=1), r"^run_with_cache\(\) has no argument 'runner': there is input, "),
        (lambda m: m.run_with_hooks("x", fwd_hook=[]), r"^run_with_hooks\(\) has no .* did you mean fwd_hooks\?"),
        (lambda m: m.run_with_interventions("x", [], strikt=True), r"^run_with_interventions\(\) .* did you mean strict\?"),
        (lambda m: m.gradients("x", LogitDiff(5, 7), name="z"), r"^gradients\(\) .* did you mean names\?"),
        (
            lambda m: sweep(m, "x", act_patch_sites(m, "x", "resid_pre"), "zero", LogitDiff(5, 7), save="out"),
            r"^sweep\(\) has no argument 'save': did you mean save_to\?",
        ),
        (
            lambda m: attribution_patch(m, "x", act_patch_sites(m, "x", "resid_pre"), "zero", LogitDiff(5, 7), step=3),
            r"^attribution_patch\(\) .* did you mean steps\?",
        ),
        (lambda m: m.run_with_cache("x", "logits", False, *[None] * 9), r"^run_with_cache\(\) was given too many"),
        (
            lambda m: m.run_with_cache("x", "logits", False, True, prepend_bos=True),
            r"^run_with_cache\(\) was given prepend_bos twice",
        ),
    ],
)  # fmt: skip
def test_an_argument_that_there_is_not_names_the_function_that_was_called(
    call: Callable[[HookedTransformer], object], said: str, tiny: HookedTransformer
) -> None:
    with pytest.raises(TypeError, match=said):
        call(tiny)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.to_tokens("caf\udce9"), r"'caf\\udce9' holds '\\udce9' at index 3, which is no character"),
        (lambda m: m(["fine", "not \ud83d fine"]), r"holds '\\ud83d' at index 4"),
        (lambda m: m.to_tokens(b"John"), r"b'John' is no text but bytes: decode it first"),
        (lambda m: m.to_tokens(["John", None]), r"None is no text but NoneType"),
        (lambda m: m.to_tokens(None), r"None is no text but NoneType"),
        (lambda m: m.to_tokens([]), r"the list of texts is empty"),
        (lambda m: m.to_tokens([3]), r"3 is no text but int"),
        (lambda m: small(m).decode([-1]), r"integers from 0, are wanted, not \[-1\]"),
        (lambda m: small(m).decode([1.5]), r"integers from 0, are wanted, not \[1\.5\]"),
        (lambda m: m.run_with_hooks(TOKENS, fwd_hooks={"hook_embed": keep}), r"not a dict: pass list\(hooks\.items\(\)\)"),
        (lambda m: m.run_with_hooks(TOKENS, fwd_hooks=("hook_embed", keep)), r"'hook_embed' among them is no pair"),
        (lambda m: m.to_tokens("x", prepend_bos="False"), r"prepend_bos='False': prepend_bos must be True or False"),
        (lambda m: m.reset_hooks(direction="forward"), r"direction must be 'fwd', 'bwd' or 'both', not 'forward'"),
        (lambda m: Ablate(HOOK, positions=slice(0, 4, 0)), r"the step of a slice is not 0"),
        (lambda m: Ablate(HOOK, positions=[2**63]), r"no activation is that long"),
        (lambda m: Ablate(HOOK, np.zeros((0, 3))), r"Ablate\.value is an empty array, of shape \[0, 3\]"),
        (lambda m: Ablate(HOOK, strict="no"), r"Ablate\.strict='no': Ablate\.strict must be True or False"),
        (lambda m: get_act_name(3), r"names no hook point: \('z', 3\) would"),
    ],
)  # fmt: skip
def test_the_sentence_names_what_was_found_and_what_to_do(
    call: Callable[[HookedTransformer], object], said: str, tiny: HookedTransformer
) -> None:
    with pytest.raises((InputError, UnknownHookPoint), match=said):
        call(tiny)


def test_switches_may_be_numpys(tiny: HookedTransformer) -> None:
    for on in (True, np.True_, np.asarray(True)):
        assert tiny.to_tokens(PROMPT, prepend_bos=on)[0, 0] == tiny.tokenizer.bos_token_id
    assert tiny.get_token_position(np.int64(tiny.to_single_token(" Mary")), "John and Mary") == 4


# Edits in files


def spec(**changed: Any) -> str:
    record = {"kind": "steer", "hook": HOOK, "vector": 1.0, **changed}
    return json.dumps({"format": "graphlens.interventions", "version": 1, "interventions": [record]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", r"its format is \[\]"),
        ('{"format": "graphlens.interventions", "version": "1", "interventions": []}', "its version is '1', not a whole"),
        ('{"format": "graphlens.interventions", "version": 1, "interventions": {}}', r"its interventions is \{\}, not a list"),
        (spec(kind=["steer"]), r"kind \['steer'\]; there is ablate, patch, steer, scale"),
        (spec(positions={"slice": [0, 4, 0]}), "the step of a slice is not 0"),
        (spec(positions={"slice": [0, 4]}), "neither a number, a tensor nor a slice"),
        (spec(positions={"slice": ["a", None, None]}), "the start of the slice at positions must be a whole number"),
        (spec(vector={"number": "seven"}), "neither a number, a tensor nor a slice"),
        (spec(vector={"tensor": "a"}), "the tensor 'a' is missing"),
        (spec(coefficient=None), r"Steer\.coefficient must be a number"),
        (spec(strict="false"), "strict must be true or false, not 'false'"),
        (spec().replace(', "vector": 1.0', ""), "Steer needs 'vector'"),
        ('{"format": "graphlens.interventions", "version": 1, "interventions": [null]}', "kind None"),
    ],
)  # fmt: skip
def test_a_spec_that_is_none_is_refused_by_file_and_number(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        interventions.load(path)
    assert str(caught.value).startswith(str(path))
    if '"kind"' in text or "null" in text:
        assert "intervention 0" in str(caught.value)


def test_arrays_of_a_dtype_that_numpy_lacks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "edits.json").write_text(spec(vector={"tensor": "a"}))
    save_file({"a": np.zeros(8, np.uint8)}, tmp_path / "edits.safetensors")
    data = (tmp_path / "edits.safetensors").read_bytes()
    assert b'"U8"' in data
    header = json.loads(data[8:].split(b"}}", 1)[0] + b"}}")
    header["a"] |= {"dtype": "F8_E4M3"}
    text = json.dumps(header).encode()
    (tmp_path / "edits.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match=r"edits\.json: cannot be read"):
        interventions.load(tmp_path / "edits.json")


# Manifests


def change(manifest: Any, *path: Any, to: Any) -> str:
    found = json.loads(manifest)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return json.dumps(found)


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("hooks", "hook_embed", "dtype"), "datetime64", "'hook_embed' has the dtype 'datetime64'"),
        (("hooks", "hook_embed", "dtype"), "", "'hook_embed' has the dtype ''"),
        (("hooks", "hook_embed", "axes", 1), 3, "the axes of 'hook_embed' are"),
        (("hooks", "hook_embed", "axes", 1), ["pos"], "the axes of 'hook_embed' are"),
        (("config", "dtype"), "int8", "computes in 'int8'"),
        (("config", "d_head"), 0, "d_head is 0"),
        (("config", "n_layers"), -3, "n_layers is -3"),
        (("config", "d_vocab"), 10**30, "d_vocab is 1000000"),
        (("config", "eps"), float("nan"), "eps is nan"),
        (("config", "eps"), -1e-5, "no model has eps -1e-05"),
        (("config", "window_size"), 10**30, "window_size is 1000000"),
        (("config", "window_size"), 0, "window_size is 0"),
        (("config", "num_experts"), 10**9, "num_experts is 1000000000"),
        (("config", "rotary_short"), -1, "rotary_short is -1"),
        (("config", "attn_scale"), 0.0, "attn_scale 0.0"),
        (("config", "output_logits_soft_cap"), float("inf"), "output_logits_soft_cap is inf"),
        (("config", "n_key_value_heads"), 3, "n_key_value_heads=3"),
        (("weights", "blocks.0.attn.W_Q", "take"), [1, 3, 3], "take of the weight 'blocks.0.attn.W_Q'"),
        (("weights", "blocks.0.attn.W_Q", "take"), [1, 0, 0], "take of the weight"),
        (("weights", "blocks.0.attn.W_Q", "take"), [1, 0], "take of the weight"),
        (("weights", "blocks.0.attn.W_Q", "shape"), ["a"], "shape of the weight"),
        (("weights", "blocks.0.attn.W_Q", "shape"), [[1]], "shape of the weight"),
        (("weights", "blocks.0.attn.W_Q", "permute"), [0, 0, 1], "permute of the weight"),
        (("weights", "blocks.0.attn.W_Q", "permute"), [1.5], "permute of the weight"),
    ],
)
def test_a_manifest_of_the_wrong_kind_is_refused(
    path: tuple[Any, ...], to: Any, said: str, tiny: HookedTransformer
) -> None:
    text = tiny.runner.engine.manifest.to_json()
    assert Manifest.from_json(text).hooks == tiny.runner.engine.manifest.hooks
    with pytest.raises(ModelFileError, match=f"model.onnx: the graphlens manifest is malformed.*{re.escape(said)}"):
        Manifest.from_json(change(text, *path, to=to), "model.onnx")


def test_an_axis_that_there_is_not_is_refused(tiny_folder: Path) -> None:
    graph = surgery.load(tiny_folder)
    graph.metadata_props["graphlens"] = change(
        graph.metadata_props["graphlens"], "hooks", "hook_embed", "axes", 1, to="position"
    )
    with pytest.raises(ModelFileError, match=r"^m\.onnx: the manifest gives 'hook_embed' the axis 'position'"):
        surgery.read_manifest(graph, "m.onnx")


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "layer_norm_epsilon"])
def test_a_config_of_impossible_sizes_is_refused_before_anything_is_built(key: str) -> None:
    plain = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "layer_norm_epsilon": 1e-5}
    assert supported_family(plain, "mine").architecture == "GPT2LMHeadModel"
    for value in (
        None,
        "x",
        0,
        -1,
        [],
        {},
        True,
        float("nan"),
        float("inf"),
        *([1.5] if key != "layer_norm_epsilon" else []),
    ):
        with pytest.raises(
            ExportError, match=rf"^mine: config\.json sets {key}=.*, and it must be a (whole )?number above 0"
        ):
            supported_family({**plain, key: value}, "mine")


def test_a_model_whose_folder_was_removed_says_so(tiny: HookedTransformer, tiny_copy: Path) -> None:
    opened, other = HookedTransformer.from_onnx(tiny_copy, "cpu"), HookedTransformer.from_onnx(tiny_copy, "cpu")
    np.testing.assert_array_equal(opened.W_E, tiny.W_E)
    opened(TOKENS)
    shutil.rmtree(tiny_copy)
    for call in (
        lambda: other(TOKENS),
        lambda: other.W_E,
        lambda: opened.run_with_hooks(TOKENS, fwd_hooks=[(HOOK, keep)]),
    ):
        with pytest.raises(ModelFileError, match=re.escape(str(tiny_copy))):
            call()
    np.testing.assert_array_equal(opened(TOKENS), tiny(TOKENS))
