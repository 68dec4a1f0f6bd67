"""The inputs that files are compared on: plain, padded on either side, with counted positions, with past, pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from tests.adopt.checkpoints import CHECKPOINTS

# Case -> how many of the tokens run before. As many as there are heads are never left: the oracle tells axes by their sizes.
# ONNX Runtime's GroupQueryAttention takes one token a row after a past.
PAST = {"past": 4, "step": 10}
CASES = {
    "decoder": ("plain", "left", "right", "counted", "past", "step"),
    "encoder": ("plain", "right"),
    "vision": ("plain",),
}


def cases_of(name: str) -> tuple[str, ...]:
    """The names of a family's cases."""
    return CASES[CHECKPOINTS[name].kind]


def inputs_of(name: str, case: str) -> dict[str, np.ndarray]:
    """The inputs of a case, by the names that transformers has for them.

    In "left" and "right" positions count padding (what a file without ``position_ids`` does), in "counted" they do not.
    In "past" and "step" the first PAST tokens are to be run first: ``input_ids`` holds all of them.
    """
    rng = np.random.default_rng(3)
    kind = CHECKPOINTS[name].kind
    if kind == "vision":
        return {"pixel_values": rng.standard_normal((2, 3, 24, 24)).astype(np.float32)}
    tokens = rng.integers(1, CHECKPOINTS[name].arguments["vocab_size"], (3, 11))
    mask = np.ones_like(tokens)
    if case in ("left", "counted"):
        mask[1, :4] = mask[2, :7] = 0
    if case == "right":
        mask[1, -4:] = mask[2, -7:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if kind == "encoder":
        return inputs | {"token_type_ids": rng.integers(0, 2, tokens.shape)}
    counted = np.maximum(mask.cumsum(-1) - 1, 0) if case == "counted" else np.arange(mask.shape[1])[None].repeat(3, 0)
    return inputs | {"position_ids": counted}


def real_of(inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which positions of a case's activations belong to real tokens, bool [b, p]; None where all do."""
    if "attention_mask" not in inputs:
        return None
    mask = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :].astype(bool)
    return None if mask.all() else mask


def feeds_of(name: str, saved: Mapping[str, np.ndarray], wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """A case's inputs for a file: what its inputs ask for, by transformers' or optimum's names.

    Args:
        name: The family.
        saved: A saved case: its inputs under ``in.``.
        wanted: The names of the file's inputs.
    """
    arguments = CHECKPOINTS[name].arguments
    given = {key.removeprefix("in."): saved[key] for key in saved if key.startswith("in.")}
    batch = next(iter(given.values())).shape[0]
    feeds: dict[str, np.ndarray] = {}
    for asked in wanted:
        if asked in given:
            feeds[asked] = given[asked]
        elif asked.startswith("past"):  # optimum's and genai's past, [b, heads, past, d_head]
            heads = arguments.get("num_attention_heads") or arguments["n_head"]
            width = arguments.get("head_dim") or (arguments.get("hidden_size") or arguments["n_embd"]) // heads
            feeds[asked] = np.zeros([batch, arguments.get("num_key_value_heads", heads), 0, width], np.float32)
        else:
            raise ValueError(f"no case has an input {asked!r}")
    return feeds


def past_of(
    layers: Iterator[tuple[np.ndarray, np.ndarray]] | list[tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
    """optimum's names of past keys and values, [b, heads, past, d_head] each."""
    named: dict[str, np.ndarray] = {}
    for layer, (key, value) in enumerate(layers):
        named |= {f"past_key_values.{layer}.key": key, f"past_key_values.{layer}.value": value}
    return named
