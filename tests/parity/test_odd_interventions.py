"""Interventions on odd-shaped random models and in other precisions: by data, by Python hook and baked are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings

import graphlens
from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer
from graphlens.interventions import Intervention
from tests.intervention_specs import FLAG_SETS, baked, close, plain_session, python_hooks, runs, set_flags

few = settings(max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate])


@pytest.mark.filterwarnings("ignore:two patches of the same elements")
@pytest.mark.parametrize("flags", FLAG_SETS, ids=str)
def test_an_odd_model(flags: tuple[str, ...], odd_hooked: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = HookedTransformer.from_onnx(odd_hooked, "cpu")
    set_flags(model, flags)

    @few
    @given(runs(model, list(model.hook_dict)))
    def check(run: tuple[np.ndarray, list[Intervention]]) -> None:
        tokens, items = run
        expected = model.run_with_hooks(tokens, fwd_hooks=python_hooks(model, items))
        assert np.isfinite(expected).all()
        close(model.run_with_interventions(tokens, items), expected)
        folder = baked(model, items, tmp_path_factory.mktemp("baked") / "out")
        close(plain_session(folder).run(["logits"], {"input_ids": tokens})[0], expected)

    check()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float16", 1e-2), ("bfloat16", 1e-5)])
def test_another_precision(
    dtype: str, tolerance: float, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    model = HookedTransformer.from_pretrained_no_processing(graphlens.embedded_model(), dtype=dtype, device="cpu")
    vector = np.random.default_rng(1).standard_normal(model.cfg.d_model)
    items = [
        Ablate("blocks.1.attn.hook_z", heads=2),
        Steer("blocks.2.hook_resid_post", vector, 0.5, positions=-1),
        Scale("blocks.0.mlp.hook_post", 0.5, dims=slice(3, 90)),
        Patch("blocks.3.attn.hook_q", 0.25, heads=0, positions=[1, 2]),
    ]
    expected = model.run_with_hooks(tokens, fwd_hooks=python_hooks(model, items))
    close(model.run_with_interventions(tokens, items), expected, tolerance)
    folder = model.bake(items, tmp_path / "out")
    close(plain_session(folder).run(["logits"], {"input_ids": tokens})[0], expected, tolerance)


def test_the_torch_face_takes_and_gives_tensors(tokens: np.ndarray) -> None:
    from graphlens.torch import HookedTransformer as TorchModel

    numpy_model, model = (make.from_onnx(graphlens.embedded_model(), "cpu") for make in (HookedTransformer, TorchModel))
    ids = torch.from_numpy(tokens.copy())
    _, cache = model.run_with_cache(ids.flip(0))
    name = "blocks.1.hook_resid_pre"
    items = [Patch(name, cache[name][:, 2:4], positions=torch.tensor([2, 3])), Steer(name, cache[name][0, 0], 2.0)]
    logits, edited = model.run_with_interventions(ids, items, names_filter=name)
    assert isinstance(logits, torch.Tensor)
    assert isinstance(edited[name], torch.Tensor)
    arrays = [
        Patch(name, cache[name].numpy()[:, 2:4], positions=[2, 3]),
        Steer(name, cache[name][0, 0].numpy(), 2.0),
    ]
    assert items == arrays
    close(logits.numpy(), numpy_model.run_with_interventions(tokens, arrays), 1e-6)
    with model.intervene(items):
        assert isinstance(model.generate(ids, 3, verbose=False, do_sample=False), torch.Tensor)
