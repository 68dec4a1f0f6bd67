"""The glossary's hook points have the shapes that it tells, in the model that it names."""

from __future__ import annotations

import re
from pathlib import Path

from graphlens import HookedTransformer

PAGE = Path(__file__).resolve().parents[2] / "docs/glossary.md"
PROMPT = "When John and Mary went to the store, John gave a drink to"


def test_the_shapes_are_the_models(tiny: HookedTransformer) -> None:
    _, cache = tiny.run_with_cache(PROMPT)
    told = 0
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 4 or not re.match(r"\[\d", cells[3]):
            continue
        shapes = re.findall(r"\[[\d, ]+\]", cells[3])
        for number, hook in enumerate(re.findall(r"`([\w.]+)`", cells[2])):
            name = hook if hook in cache else f"blocks.1.{hook}"
            assert str(list(cache[name].shape)) == shapes[min(number, len(shapes) - 1)], (hook, cells[0])
            told += 1
    assert told >= 15


def test_the_sizes_are_the_models(tiny: HookedTransformer) -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    cfg = tiny.cfg
    assert (
        f"{cfg.n_layers} layers, {cfg.n_heads} heads of width {cfg.d_head}, residual stream of width {cfg.d_model},"
        in text
    )
    assert f"MLP of width {cfg.d_mlp}, {cfg.d_vocab} tokens" in text
    assert f"one prompt of {tiny.to_tokens(PROMPT).shape[1]} tokens" in text
