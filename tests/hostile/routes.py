"""The ways a folder from a stranger is used. Each returns what differs from the untouched file's numbers."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import graphlens
from graphlens import HookedTransformer, interventions, surgery
from graphlens.cli.app import app, main
from graphlens.errors import GraphlensError, InputError
from tests.hostile.cases import HarnessError, Place
from tests.hostile.truth import (
    ANSWER,
    CORRUPTED,
    PROMPT,
    WRONG_ANSWER,
    Array,
    Truth,
    bare_session,
    differs,
    log_softmax,
    run_bare,
    softmax,
)

READ = ("blocks.0.hook_resid_pre", "blocks.1.attn.hook_pattern", "blocks.2.mlp.hook_post", "ln_final.hook_scale")
# A head of one layer set to zero: what a baked file does.
EDIT = {"kind": "ablate", "hook": "blocks.1.attn.hook_z", "value": 0.0, "heads": [2]}
NEW_TOKENS = 5


@dataclass(frozen=True)
class Expected:
    """The numbers of the untouched file, computed once, by plain ONNX Runtime, before any case is played."""

    tokens: Array
    logits: Array
    activations: dict[str, Array]
    edited: Array
    prompt: list[int]
    prompt_logits: Array
    prompt_pattern: Array
    continuation: str
    patched: Array
    weights: dict[str, Array]
    hooks: list[str]

    @classmethod
    def of(cls, truth: Truth) -> Expected:
        """Those of a folder."""
        from safetensors.numpy import load_file

        logits, *activations = truth.run(truth.tokens, ("logits", *READ))
        clean, corrupted = truth.ids(PROMPT), truth.ids(CORRUPTED)
        prompt_logits, pattern = truth.run(np.asarray([clean]), ("logits", READ[1]))
        return cls(
            truth.tokens,
            logits,
            dict(zip(READ, activations, strict=True)),
            truth.edited(truth.tokens, [EDIT]),
            clean,
            prompt_logits,
            pattern,
            _continuation(truth, clean),
            _patched(truth, clean, corrupted),
            load_file(truth.folder / "model.safetensors"),
            list(truth.manifest["hooks"]),
        )


def _continuation(truth: Truth, ids: list[int]) -> str:
    """The prompt and its greedy continuation, as text."""
    for _ in range(NEW_TOKENS):
        ids = [*ids, int(truth.run(np.asarray([ids]))[0][0, -1].argmax())]
        if ids[-1] == 0:
            break
    return str(truth.tokenizer.decode(ids[1:], skip_special_tokens=True))


def _patched(truth: Truth, clean: list[int], corrupted: list[int]) -> Array:
    """The logit difference with each layer's residual at each position of one run put into the other's."""
    answer, wrong = (truth.tokenizer.encode(text).ids[-1] for text in (ANSWER, WRONG_ANSWER))
    tokens = np.asarray([corrupted])
    rows = []
    for layer in range(int(truth.manifest["config"]["n_layers"])):
        hook = f"blocks.{layer}.hook_resid_pre"
        (source,), (value,) = truth.run(np.asarray([clean]), [hook]), truth.run(tokens, [hook])
        for position in range(len(clean)):
            patched = value.copy()
            patched[:, position] = source[:, position]
            logits = truth.with_value(tokens, hook, patched)[0, -1]
            rows.append(logits[answer] - logits[wrong])
    return np.asarray(rows, np.float64).reshape(-1, len(clean))


Use = Callable[[Expected, Place], list[str]]


@dataclass(frozen=True)
class Route:
    """One way to use a folder.

    Attributes:
        name: Its name in a case's.
        use: Goes it; an error it may raise.
        reads: The parts of the folder that it reads, and so owes a refusal of.
    """

    name: str
    use: Use
    reads: frozenset[str]


ROUTES: dict[str, Route] = {}
MODEL_PARTS = ("graph", "weights")


def route(*reads: str) -> Callable[[Use], Use]:
    """Registers a route."""

    def register(use: Use) -> Use:
        name = use.__name__.strip("_")
        ROUTES[name] = Route(name, use, frozenset(reads))
        return use

    return register


def command(*arguments: str | Path, place: Place) -> str:
    """What a command prints, in this process; its one readable error becomes that error again.

    Raises:
        GraphlensError: The command ended in an error of ours.
        RuntimeError: It ended in any other way, or printed a traceback.
        HarnessError: It has no such option or argument.
    """
    before, said = sys.argv, place.log.stat().st_size
    sys.argv = ["graphlens", *map(str, arguments)]
    printed, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(printed):
            main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = before
    sys.stderr.flush()
    errors = place.log.read_bytes()[said:].decode(errors="replace")
    if code == 2:
        raise HarnessError(errors[-1000:])
    if "Traceback" in errors or code not in (0, 1):
        raise RuntimeError(f"exit code {code}: {errors[-1000:]}")
    if code:
        raise GraphlensError(errors[-1000:])
    return printed.getvalue()


@functools.cache
def has_option(name: str, option: str) -> bool:
    """True if a command of this version has an option: one of a later version is asked for only there."""
    import typer

    found = typer.main.get_command(app)
    return any(option in parameter.opts for parameter in found.commands[name].params)  # type: ignore[attr-defined]


# From Python


@route(*MODEL_PARTS)
def _open(expected: Expected, place: Place) -> list[str]:
    model = HookedTransformer.from_onnx(place.model, "cpu")
    logits, cache = model.run_with_cache(expected.tokens)
    wrong = differs(logits, expected.logits, "logits")
    wrong += [line for name in READ for line in differs(cache[name], expected.activations[name], name)]
    weights = model.weights
    if "embed.W_E" not in weights:
        return wrong  # a manifest without it: whoever asks for it is told that there is none
    return wrong + differs(weights["embed.W_E"], expected.weights[_embedding(expected)], "W_E", 0)


def _embedding(expected: Expected) -> str:
    return next(name for name in expected.weights if name.endswith("wte.weight"))


@route(*MODEL_PARTS, "tokenizer")
def _check(_: Expected, place: Place) -> list[str]:
    surgery.check(place.model)
    return []


@route(*MODEL_PARTS)
def _edit(expected: Expected, place: Place) -> list[str]:
    model = HookedTransformer.from_onnx(place.model, "cpu")
    edits = [interventions.Ablate(EDIT["hook"], heads=EDIT["heads"])]
    return differs(model.run_with_interventions(expected.tokens, edits), expected.edited, "edited logits")


@route(*MODEL_PARTS)
def _pretrained(expected: Expected, place: Place) -> list[str]:
    model = HookedTransformer.from_pretrained_no_processing(place.model, providers="cpu")
    return differs(model(expected.tokens), expected.logits, "logits")


@route(*MODEL_PARTS)
def _surgery(expected: Expected, place: Place) -> list[str]:
    written = surgery.save(surgery.load(place.model), place.out)
    return _bare(written, expected, expected.logits)


@route("tokenizer")
def _tokenizer(expected: Expected, place: Place) -> list[str]:
    from graphlens.file.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(place.model)
    if tokenizer is None:
        raise InputError("this model has no tokenizer")  # as every call with a text says then
    return [] if [0, *tokenizer.encode(PROMPT, add_special_tokens=False)] == expected.prompt else ["other tokens"]


@route(*MODEL_PARTS)
def _bake(expected: Expected, place: Place) -> list[str]:
    edits = [interventions.Ablate(EDIT["hook"], heads=EDIT["heads"])]
    return _bare(graphlens.bake_model(place.model, edits, place.out) / "model.onnx", expected, expected.edited)


@route(*MODEL_PARTS)
def _drivable(expected: Expected, place: Place) -> list[str]:
    graphlens.write_drivable(place.model, ["blocks.*.attn.hook_z"], place.out)
    return _bare(place.out / "model.onnx", expected, expected.logits)


def _bare(path: Path, expected: Expected, logits: Array) -> list[str]:
    """What a written file computes, by plain ONNX Runtime."""
    found = _computed(path, expected)
    return [found] if isinstance(found, str) else differs(found, logits, f"logits of {path.name}")


def _computed(path: Path, expected: Expected) -> Array | str:
    """The logits of a written file by plain ONNX Runtime, or why it gives none."""
    try:
        return run_bare(bare_session(str(path)), expected.tokens, ["logits"])[0]
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return f"plain ONNX Runtime refuses what was written: {str(error)[-200:]}"


# From the terminal


@route(*MODEL_PARTS, "tokenizer")
def _run(expected: Expected, place: Place) -> list[str]:
    rows = json.loads(command("run", place.model, PROMPT, "--json", place=place))["next"]
    best = np.sort(softmax(expected.prompt_logits[0, -1]))[::-1][: len(rows)]
    return differs([row["probability"] for row in rows], best, "probabilities")


@route(*MODEL_PARTS, "tokenizer")
def _cache(expected: Expected, place: Place) -> list[str]:
    from safetensors.numpy import load_file

    written = place.out.with_suffix(".safetensors")
    command("cache", place.model, PROMPT, "--names", "*.hook_pattern", "-o", written, place=place)
    found = load_file(written)
    wrong = differs(found["tokens"], np.asarray([expected.prompt]), "tokens")
    return wrong + differs(found[READ[1]], expected.prompt_pattern, READ[1])


@route(*MODEL_PARTS)
def _hooks(expected: Expected, place: Place) -> list[str]:
    found = json.loads(command("hooks", place.model, "--json", place=place))
    return [] if set(found) >= set(expected.hooks) else ["hook points are missing"]


@route(*MODEL_PARTS, "tokenizer")
def _generate(expected: Expected, place: Place) -> list[str]:
    said = command("generate", place.model, PROMPT, "-n", str(NEW_TOKENS), place=place)
    return [] if said.strip() == expected.continuation.strip() else [f"{said!r}, not {expected.continuation!r}"]


@route(*MODEL_PARTS, "tokenizer")
def _patch(expected: Expected, place: Place) -> list[str]:
    from safetensors.numpy import load_file

    pair = ("--clean", PROMPT, "--corrupted", CORRUPTED, "--answer", ANSWER, "--wrong", WRONG_ANSWER)
    command("patch", place.model, *pair, "--raw", "--json", "-o", place.out, place=place)
    found = load_file(place.out / "resid_pre.safetensors")["values"]
    return differs(found, expected.patched, "patched logit differences")


@route(*MODEL_PARTS)
def _strip(expected: Expected, place: Place) -> list[str]:
    command("strip", place.model, "-o", place.out, place=place)
    return _bare(place.out / "model.onnx", expected, expected.logits)


@route(*MODEL_PARTS)
def _process(expected: Expected, place: Place) -> list[str]:
    command("process", place.model, "-o", place.out, place=place)
    found = _computed(place.out / "model.onnx", expected)
    if isinstance(found, str):
        return [found]
    # Centring the unembedding moves all logits of a position alike, which no probability sees.
    return differs(log_softmax(found), log_softmax(expected.logits), "log probabilities", 1e-3)


@route(*MODEL_PARTS, "edits")
def _edits_file(expected: Expected, place: Place) -> list[str]:
    command("bake", place.model, place.edits, "-o", place.out, place=place)
    return _bare(place.out / "model.onnx", expected, expected.edited)


@route(*MODEL_PARTS, "tokenizer")
def _check_run(_: Expected, place: Place) -> list[str]:
    whole = ["--full"] if has_option("check", "--full") else []
    running = ["--run"] if has_option("check", "--run") else []
    command("check", place.model, *whole, *running, place=place)
    return []
