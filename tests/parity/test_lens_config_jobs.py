"""What is done with models from TransformerLens's configs: sweeps, other weights, generation, precision, edits in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lens_configs import CONFIGS, bound, lens_model
from test_lens_configs import TOKENS, close

import graphlens
from graphlens import patching
from graphlens.errors import RuntimeUnavailable
from graphlens.metrics import LogitDiff
from graphlens.pipelines import from_config
from graphlens.surgery.precision import convert_into

# One of each kind of block layout.
_CHOSEN = ("attn_only_no_norm", "no_norm", "solu_ln", "shortformer", "llama_like", "parallel", "bidirectional", "alibi")


@pytest.fixture(scope="module", params=_CHOSEN)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = request.param
    return name, bound(CONFIGS[name], lens_model(CONFIGS[name]), tmp_path_factory.mktemp(name) / "model")


def test_a_sweep_is_the_loop(named: tuple[str, Path]) -> None:
    model = graphlens.HookedTransformer.from_onnx(named[1])
    corrupted = TOKENS.copy()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % 23
    _, cache = model.run_with_cache(TOKENS)
    metric = LogitDiff(1, 0)
    residual = np.asarray(patching.get_act_patch_resid_pre(model, corrupted, cache, metric))
    values = np.asarray(patching.get_act_patch_attn_head_v_by_pos(model, corrupted, cache, metric))
    for layer in range(2):
        for position in (0, 2, 6):

            def patch(value, hook, position=position):  # type: ignore[no-untyped-def]
                value[:, position] = cache[hook.name][:, position]

            def patch_head(value, hook, position=position):  # type: ignore[no-untyped-def]
                value[:, position, 1] = cache[hook.name][:, position, 1]

            for hook, function, found in (
                ("hook_resid_pre", patch, residual[layer, position]),
                ("attn.hook_v", patch_head, values[layer, position, 1]),
            ):
                logits = model.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.{hook}", function)])
                assert abs(float(metric(np.asarray(logits))) - found) < 1e-4


def test_weights_that_are_set_are_those_of_another_state_dict(named: tuple[str, Path]) -> None:
    model, theirs = graphlens.HookedTransformer.from_onnx(named[1]), lens_model(CONFIGS[named[0]], seed=7)
    wanted = from_config.state_shapes(CONFIGS[named[0]])
    model.set_weights({name: value for name, value in theirs.state_dict().items() if name in wanted})
    close(model(TOKENS), theirs(torch.from_numpy(TOKENS)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-5), ("float16", 2e-2)])
def test_another_precision_computes_the_same(
    named: tuple[str, Path], dtype: str, tolerance: float, tmp_path: Path
) -> None:
    convert_into(named[1] / "model.onnx", tmp_path, dtype)
    expected = torch.from_numpy(graphlens.HookedTransformer.from_onnx(named[1])(TOKENS))
    close(np.asarray(graphlens.HookedTransformer.from_onnx(tmp_path)(TOKENS), np.float32), expected, tolerance)


def test_greedy_tokens_are_transformerlens(named: tuple[str, Path]) -> None:
    if named[0] in ("bidirectional", "no_norm"):
        pytest.skip("its logits are not of the tokens that it takes")
    model, theirs = graphlens.HookedTransformer.from_onnx(named[1]), lens_model(CONFIGS[named[0]])
    found = model.generate(TOKENS, 5, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False)
    tokens = torch.from_numpy(TOKENS)
    for _ in range(5):
        tokens = torch.cat([tokens, theirs(tokens)[:, -1:].argmax(-1)], 1)
    np.testing.assert_array_equal(np.asarray(found), tokens.numpy())


def test_an_edit_in_the_file_is_the_edit_of_a_run(named: tuple[str, Path], tmp_path: Path) -> None:
    model = graphlens.HookedTransformer.from_onnx(named[1])
    edits = [
        graphlens.Ablate("blocks.0.attn.hook_z", heads=1),
        graphlens.Scale("blocks.1.hook_attn_out", 0.5),
        graphlens.Scale("blocks.1.attn.hook_q", 1.5),
    ]
    with model.intervene(edits):
        expected = np.asarray(model(TOKENS))
    model.bake(edits, tmp_path / "baked")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "baked" / "model.onnx")
    (logits,) = session.run(["logits"], {"input_ids": TOKENS})
    close(logits, torch.from_numpy(expected))


def test_without_torch_a_new_config_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path))
    monkeypatch.setattr("graphlens.pipelines.from_config.installed", lambda name: name != "torch")
    with pytest.raises(RuntimeUnavailable, match=r"torch, which is not installed.*export"):
        from_config.graph_of(CONFIGS["plain"])
