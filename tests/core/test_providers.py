"""Which ONNX Runtime provider runs a model, and what is said where one, or a package, is missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from graphlens import HookedTransformer
from graphlens.errors import InputError, RuntimeUnavailable
from graphlens.runtime import choose_providers, open_session, operators
from graphlens.runtime.providers import require_active

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PRE = "blocks.1.hook_resid_pre"


class FakeSession:
    """A session with the providers it was told to have."""

    def __init__(self, active: Sequence[str]) -> None:
        self._active = list(active)

    def get_providers(self) -> list[str]:
        return self._active

    def get_inputs(self) -> list[Any]:
        return []

    get_overridable_initializers = get_outputs = get_inputs


@pytest.fixture
def cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime as its CPU wheel describes itself."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime as its GPU wheel describes itself."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr("graphlens.runtime.providers.preload_cuda", lambda: None)


# Providers


@pytest.mark.usefixtures("cpu_build")
@pytest.mark.parametrize("asked", ["cpu", "CPU", CPU, [CPU], (CPU,)])
def test_the_cpu_can_be_asked_for_by_any_name(asked: Any) -> None:
    assert choose_providers(asked) == ([CPU], True)


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("asked", ["cuda", "gpu", "CUDA", [CUDA, CPU]])
def test_cuda_keeps_the_cpu_behind_it(asked: Any) -> None:
    assert choose_providers(asked) == ([CUDA, CPU], True)


@pytest.mark.usefixtures("cpu_build")
def test_by_default_the_cpu_is_used_where_there_is_no_cuda() -> None:
    assert choose_providers(None) == ([CPU], False)


@pytest.mark.usefixtures("cuda_build")
def test_by_default_cuda_is_tried_first_where_it_was_built_in() -> None:
    assert choose_providers(None) == ([CUDA, CPU], False)


@pytest.mark.parametrize("asked", ["tpu", "", "NoSuchExecutionProvider", ["NoSuchExecutionProvider", CPU], [""]])
def test_an_unknown_provider_is_answered_with_what_there_is(asked: Any) -> None:
    bad = asked if isinstance(asked, str) else asked[0]
    with pytest.raises(InputError, match=r"'cpu'|CPUExecutionProvider") as caught:
        choose_providers(asked)
    assert f"unknown provider {bad!r}" in str(caught.value)


def test_an_empty_list_of_providers_is_refused() -> None:
    with pytest.raises(InputError, match=r"empty.*'cpu', 'cuda'"):
        choose_providers([])


@pytest.mark.usefixtures("cpu_build")
@pytest.mark.parametrize("asked", ["cuda", "gpu", [CUDA], [CUDA, CPU], [CPU, CUDA]])
def test_cuda_on_a_cpu_build_is_answered_with_the_extra_to_install(asked: Any, tiny_copy: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match=rf"{CUDA} .*It has: {CPU}.*graphlens-onnx\[gpu\]"):
        choose_providers(asked)
    model = HookedTransformer.from_onnx(tiny_copy, asked)
    with pytest.raises(RuntimeUnavailable, match=r"graphlens-onnx\[gpu\]"):
        model([1, 2, 3])


def test_a_provider_that_was_asked_for_and_is_not_active_is_an_error() -> None:
    with pytest.raises(RuntimeUnavailable, match=rf"{CUDA} .*not active.*fell back to {CPU}.*nvidia-smi"):
        require_active(FakeSession([CPU]), [CUDA, CPU])
    require_active(FakeSession([CUDA, CPU]), [CUDA, CPU])


@pytest.mark.usefixtures("cuda_build")
def test_a_session_that_falls_back_from_cuda_is_an_error_only_if_cuda_was_asked_for(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What ONNX Runtime does where the driver is missing: it warns, and runs on the CPU.
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: FakeSession([CPU]))
    with pytest.raises(RuntimeUnavailable, match=rf"{CUDA} .*not active"):
        open_session(tiny_copy / "model.onnx", "cuda")
    assert open_session(tiny_copy / "model.onnx").providers == [CPU]


@pytest.mark.usefixtures("cuda_build")
def test_by_default_a_cuda_that_fails_gives_way_to_the_cpu(
    tiny: HookedTransformer, tiny_copy: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, tried, expected = onnxruntime.InferenceSession, [], tiny(tokens)

    def open_(source: Any, options: Any, providers: list[Any]) -> Any:
        tried.append(providers)
        if CUDA in providers[0]:
            raise ValueError("CUDA failure 35")
        return really(source, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_)
    model = HookedTransformer.from_onnx(tiny_copy)
    np.testing.assert_array_equal(model(tokens), expected)
    # In float32 as it is: TensorFloat-32, ONNX Runtime's default, rounds what products are made of to 10 bits.
    assert tried == [[(CUDA, {"use_tf32": "0"}), CPU], [CPU]]
    assert model.providers == [CPU]
    assert model.cfg.device == "cpu"


def test_the_opened_model_says_where_it_runs(tiny: HookedTransformer) -> None:
    assert tiny.providers == [CPU]
    assert tiny.cfg.device == "cpu"


def test_on_the_cpu_saying_so_opens_no_session(tiny_copy: Path, tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    assert model.providers == [CPU]
    assert model.cfg.device == "cpu"
    assert model.sessions == []
    model.generate(tokens, 2, do_sample=False, verbose=False, return_type="tokens")
    assert model.cfg.device == "cpu"
    assert [plan.past for plan in model.sessions] == [True]


@pytest.mark.usefixtures("cuda_build")
def test_where_cuda_was_built_in_a_session_says_whether_it_is_active(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: FakeSession([CUDA, CPU]))
    assert HookedTransformer.from_onnx(tiny_copy, "cuda").cfg.device == "cuda"
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: FakeSession([CPU]))
    assert HookedTransformer.from_onnx(tiny_copy).cfg.device == "cpu"


# Packages that are missing


def test_without_onnx_runtime_a_model_describes_itself_and_running_names_the_extras(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = HookedTransformer.from_onnx(tiny_copy)
    assert model.hook_points()["blocks.0.attn.hook_z"] == ("[batch, pos, 4, 32]", "float32")
    with pytest.raises(RuntimeUnavailable, match=r"graphlens-onnx\[cpu\].*graphlens-onnx\[gpu\].*not both"):
        model(model.to_tokens("When John"))


def test_a_broken_onnx_runtime_is_told_from_a_missing_one(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is left when onnxruntime and onnxruntime-gpu were both installed and one was uninstalled.
    monkeypatch.delattr(onnxruntime, "InferenceSession")
    with pytest.raises(RuntimeUnavailable, match=r"broken.*Uninstall both"):
        HookedTransformer.from_onnx(tiny_copy)([1, 2, 3])


def test_without_onnxruntime_extensions_only_hooks_are_unavailable(
    tiny: HookedTransformer, tiny_copy: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "onnxruntime_extensions" else really(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(operators, "library", None)
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    logits, cache = model.run_with_cache(tokens)
    np.testing.assert_array_equal(logits, tiny(tokens))
    assert len(cache) == len(tiny.hook_dict)
    with pytest.raises(RuntimeUnavailable, match=r"onnxruntime-extensions.*graphlens-onnx\[cpu\].*\[gpu\]"):
        model.run_with_hooks(tokens, fwd_hooks=[(PRE, lambda x, hook: x)])
    np.testing.assert_array_equal(model(tokens), logits)
