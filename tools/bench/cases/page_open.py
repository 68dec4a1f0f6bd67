"""Pages: how large the attention of GPT-2 small's shape at 30 tokens is, and how long Chromium takes to open it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from tools.bench.harness import Case, Findings, Row, Setup, Target
from tools.browser import Browser

LAYERS, HEADS, TOKENS = 12, 12, 30
LARGEST, SLOWEST = 1.0, 1.0  # MB, seconds
# When the last view was drawn: scripts run before the load event, so its end comes after them.
_OPENED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def run(setup: Setup) -> Findings:
    """Making a page, its size, and seconds from the address to the last view drawn, in a new page of a browser that runs."""
    from graphlens import views

    rng = np.random.default_rng(0)
    scores = rng.normal(size=(LAYERS, HEADS, TOKENS, TOKENS)) + np.where(np.tri(TOKENS, dtype=bool), 0, -np.inf)
    patterns = np.exp(scores)
    patterns = (patterns / patterns.sum(-1, keepdims=True)).astype(np.float32)
    cache = {f"blocks.{layer}.attn.hook_pattern": patterns[layer][None] for layer in range(LAYERS)}
    tokens = [f" token{i}" for i in range(TOKENS)]
    made, opened, sizes = [], [], []
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        for _ in range(setup.repeats):
            start = time.perf_counter()
            file = views.attention(cache, tokens).save(Path(folder, "page.html"))
            made.append(time.perf_counter() - start)
            sizes.append(file.stat().st_size / 1e6)
            page = browser.open(file)
            if page.value("document.querySelectorAll('.heads canvas').length") != LAYERS * HEADS:
                raise RuntimeError("the page was not drawn")
            opened.append(float(str(page.value(_OPENED))) / 1000)
            page.close()
    size, seconds = statistics.median(sizes), statistics.median(opened)
    return Findings(
        [
            Row("size", "MB", sizes, target=Target(size, LARGEST, "MB")),
            Row("made and written", "s", made),
            Row("opened and drawn", "s", opened, target=Target(seconds, SLOWEST, "s")),
        ],
        notes=(f"Attention of {LAYERS} layers x {HEADS} heads, {TOKENS} tokens: every weight as float32.",),
    )


CASE = Case(run, repeats=15, model="tiny")
