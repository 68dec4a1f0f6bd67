"""Hooks and torch's settings of a thread, wherever the run is made; and an export that Ctrl-C ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphlens
from graphlens.torch import HookedTransformer

Z = "blocks.1.attn.hook_z"
TOKENS = torch.arange(12).reshape(2, 6)
Settings = tuple[Any, ...]


def settings() -> Settings:
    """What torch would do in this thread, told by what it does."""
    weight = torch.ones(2, 2, requires_grad=True)
    product = weight @ weight
    return (
        product.requires_grad,
        product.dtype,
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.empty(1).device.type,
    )


def in_hook(model: HookedTransformer) -> Settings:
    """The settings inside a hook."""
    seen: list[Settings] = []

    def look(z: torch.Tensor, hook: Any) -> None:
        seen.append(settings())

    model.run_with_hooks(TOKENS, fwd_hooks=[(Z, look)])
    return seen[0]


def in_another(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("place", [lambda work: work(), in_another], ids=["main thread", "another"])
@pytest.mark.parametrize(
    "contexts",
    [
        lambda: [nullcontext()],
        lambda: [torch.no_grad()],
        lambda: [torch.inference_mode()],
        lambda: [torch.autocast("cpu", dtype=torch.bfloat16)],
        lambda: [torch.autocast("cpu", dtype=torch.float16, cache_enabled=False), torch.no_grad()],
        lambda: [torch.device("meta")],
        lambda: [torch.no_grad(), torch.enable_grad()],
    ],
    ids=["none", "no_grad", "inference", "autocast", "uncached, no_grad", "device", "enabled again"],
)
def test_a_hook_finds_the_callers_settings(contexts: Any, place: Any, model: HookedTransformer) -> None:
    def compare() -> tuple[Settings, Settings]:
        with ExitStack() as stack:
            outside = settings()
            for context in contexts():
                stack.enter_context(context)
            found = in_hook(model)
            assert found == settings()
        assert settings() == outside
        return found, outside

    _, outside = place(compare)
    assert in_hook(model) == outside  # and nothing of it stays in the thread that made the run


def test_what_a_hook_sets_for_good_is_set_for_the_caller(model: HookedTransformer) -> None:
    def set_all(z: torch.Tensor, hook: Any) -> None:
        torch.set_grad_enabled(False)
        torch.set_default_device("meta")

    before = settings()
    try:
        model.run_with_hooks(TOKENS, fwd_hooks=[(Z, set_all)])
        changed = settings()
        assert (changed[0], changed[5]) == (False, "meta")
        assert in_hook(model) == changed
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_device(None)
    assert settings() == before == in_hook(model)


def test_an_interrupted_export_leaves_nothing_and_can_be_made_again(
    odd_checkpoint: Path, odd_hooked: Path, tmp_path: Path
) -> None:
    rng, out = random.Random(5), tmp_path / "out"

    def press(seconds: float) -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    started = time.perf_counter()
    graphlens.export_model(odd_checkpoint, tmp_path / "first")
    took = time.perf_counter() - started
    ended = 0
    for _ in range(2):
        keyboard = threading.Thread(target=press, args=(rng.random() * took * 0.8,))
        try:
            keyboard.start()
            graphlens.export_model(odd_checkpoint, out)
            time.sleep(took + 10)
        except KeyboardInterrupt:
            ended += 1
        if out.exists():  # it came after the end
            graphlens.HookedTransformer.from_onnx(out, "cpu")
            break
    assert ended
    again = graphlens.export_model(odd_checkpoint, tmp_path / "again").folder
    tokens = [[1, 2, 3, 4]]
    found, expected = (graphlens.HookedTransformer.from_onnx(folder, "cpu")(tokens) for folder in (again, odd_hooked))
    np.testing.assert_array_equal(found, expected)
    assert {path.name for path in tmp_path.iterdir()} <= {"first", "again", "out"}


def test_a_hook_has_as_many_threads_as_the_caller_and_may_set_how_many(model: HookedTransformer) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def look(z: torch.Tensor, hook: Any) -> None:
        torch.ones(2) + 1  # what a thread has once it used one of torch's pools
        seen.append(torch.get_num_threads())

    def change(z: torch.Tensor, hook: Any) -> None:
        torch.set_num_threads(3)

    try:
        for count in (2, 1, 2):
            torch.set_num_threads(count)
            model.run_with_hooks(TOKENS, fwd_hooks=[(Z, look)])
        model.run_with_hooks(TOKENS, fwd_hooks=[(Z, change)])
        assert (seen, torch.get_num_threads(), in_another(torch.get_num_threads)) == ([2, 1, 2], 3, 3)
    finally:
        torch.set_num_threads(before)


def test_a_run_beside_an_import_of_torch_leaves_it_alone(tiny_folder: Path) -> None:
    code = """
import sys, threading
import graphlens
model = graphlens.HookedTransformer.from_onnx(sys.argv[1], "cpu")
hooks = [("blocks.1.attn.hook_z", lambda z, hook: None)]
model.run_with_hooks([[1, 2, 3]], fwd_hooks=hooks)
imported, runs = [], 0
def load():
    import torch
    imported.append(torch)
loading = threading.Thread(target=load)
loading.start()
while loading.is_alive():
    model.run_with_hooks([[1, 2, 3]], fwd_hooks=hooks)
    runs += 1
model.run_with_hooks([[1, 2, 3]], fwd_hooks=hooks)
assert imported and runs
"""
    done = subprocess.run([sys.executable, "-c", code, str(tiny_folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
