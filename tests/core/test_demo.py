"""The demonstration computes what it prints, on each embedded model: its figures are the API's, and follow the weights."""

from __future__ import annotations

import io
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from graphlens import HookedTransformer, embedded_model, surgery
from graphlens.cli.demo import ANSWER, CORRUPTED, PROMPT, WRONG, Demo, run_demo, show_demo
from graphlens.metrics import LogitDiff
from graphlens.pipelines.hub import EMBEDDED
from graphlens.surgery.files import write_graph
from graphlens.surgery.graph import read_manifest, write_manifest

RELATIVE = 1e-5


@pytest.fixture(scope="module", params=EMBEDDED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tiny: HookedTransformer) -> HookedTransformer:
    return tiny if name == tiny.cfg.model_name else HookedTransformer.from_onnx(embedded_model(name), "cpu")


@pytest.fixture(scope="module")
def demo(model: HookedTransformer) -> Demo:
    return run_demo(model)


@pytest.fixture(scope="module")
def perturbed(name: str, tmp_path_factory: pytest.TempPathFactory) -> HookedTransformer:
    """The embedded model with noise on every weight."""
    folder = Path(shutil.copytree(embedded_model(name), tmp_path_factory.mktemp("perturbed") / "model"))
    rng = np.random.default_rng(0)
    tensors = {
        name: tensor + rng.standard_normal(tensor.shape).astype(np.float32) * (0.2 * tensor.std() + 1e-3)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = surgery.load(folder, verify=False)
    files = {"model.safetensors": surgery.fingerprint(folder / "model.safetensors")}
    write_manifest(model, read_manifest(model).with_files(files))
    write_graph(model, folder / "model.onnx")
    return HookedTransformer.from_onnx(folder)


def difference(model: HookedTransformer, logits: np.ndarray) -> float:
    row = logits[0, -1]
    return float(row[model.to_single_token(ANSWER)] - row[model.to_single_token(WRONG)])


def check_against_the_api(model: HookedTransformer, demo: Demo) -> None:
    """Every figure again, by other means than the demo's own code."""
    logits, cache = model.run_with_cache(PROMPT)
    corrupted = model.to_tokens(CORRUPTED)
    assert demo.clean == pytest.approx(difference(model, logits), rel=RELATIVE)
    assert demo.corrupted == pytest.approx(difference(model, model(corrupted)), rel=RELATIVE)
    assert demo.activations == len(model.hook_points())

    words = model.to_str_tokens(PROMPT)
    head = demo.attended
    pattern = cache[f"blocks.{head.layer}.attn.hook_pattern"][0, head.head, -1]
    assert head.token == words[int(np.argmax(pattern))]
    assert head.weight == pytest.approx(pattern.max(), rel=RELATIVE)
    name = words.index(ANSWER)
    every = [cache[f"blocks.{i}.attn.hook_pattern"][0, :, -1, name].max() for i in range(model.cfg.n_layers)]
    assert pattern[name] == max(every)

    assert len(demo.lens) == model.cfg.n_layers + 1
    for row in demo.lens:
        lens = model.unembed(model.ln_final(cache[row.hook]))
        probabilities = np.exp(lens[0, -1].astype(np.float64))
        probabilities /= probabilities.sum()
        assert row.logit_difference == pytest.approx(difference(model, lens), rel=1e-4, abs=1e-4)
        assert row.probability == pytest.approx(probabilities.max(), rel=1e-4)
        assert row.answer_probability == pytest.approx(probabilities[model.to_single_token(ANSWER)], rel=1e-4)
        assert row.top_token == model.to_string([int(lens[0, -1].argmax())])
    assert demo.lens[-1].logit_difference == pytest.approx(demo.clean, rel=1e-3)

    mask = np.ones(model.cfg.n_heads, np.float32)
    mask[demo.ablation.head] = 0
    hooks = [(demo.ablation.hook, lambda z, hook: z * mask[:, None])]
    ablated = model.run_with_hooks(PROMPT, fwd_hooks=hooks)
    assert demo.ablation.after == pytest.approx(difference(model, ablated), rel=RELATIVE)
    p, q = (np.exp(x[0, -1].astype(np.float64)) for x in (logits, ablated))
    p, q = p / p.sum(), q / q.sum()
    assert demo.ablation.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-3, abs=1e-6)

    for row in demo.patches:

        def patch(residual: np.ndarray, hook: object, row: object = row) -> np.ndarray:
            return np.where(np.arange(residual.shape[1])[:, None] == row.position, cache[row.hook], residual)

        value = difference(model, model.run_with_hooks(corrupted, fwd_hooks=[(row.hook, patch)]))
        assert row.logit_difference == pytest.approx(value, rel=RELATIVE)
        assert row.restored == pytest.approx((value - demo.corrupted) / (demo.clean - demo.corrupted), rel=1e-4)

    for layer, row in enumerate(demo.patched_heads.values):
        for head, restored in enumerate(row):
            only = np.arange(model.cfg.n_heads)[:, None] == head
            z = cache[f"blocks.{layer}.attn.hook_z"]
            hooks = [(f"blocks.{layer}.attn.hook_z", lambda value, hook, z=z, only=only: np.where(only, z, value))]
            value = difference(model, model.run_with_hooks(corrupted, fwd_hooks=hooks))
            share = (value - demo.corrupted) / (demo.clean - demo.corrupted)
            assert restored == pytest.approx(share, rel=1e-4, abs=1e-5)
            hooks = [(f"blocks.{layer}.attn.hook_z", lambda value, hook, only=only: np.where(only, 0, value))]
            value = difference(model, model.run_with_hooks(PROMPT, fwd_hooks=hooks))
            assert demo.ablated_heads.values[layer][head] == pytest.approx(value, rel=1e-4, abs=1e-4)
    metric = LogitDiff(model.to_single_token(ANSWER), model.to_single_token(WRONG))
    gradients = model.gradients(CORRUPTED, metric.normalised(demo.clean, demo.corrupted))
    _, base = model.run_with_cache(CORRUPTED)
    for layer, row in enumerate(demo.estimated_heads.values):
        name = f"blocks.{layer}.attn.hook_z"
        expected = ((cache[name] - base[name]) * gradients[name]).sum((0, 1, 3), dtype=np.float64)
        assert list(row) == pytest.approx(list(expected), rel=1e-4, abs=1e-5)
    assert demo.ablated_heads.unedited == pytest.approx(demo.clean, rel=RELATIVE)
    assert demo.patched_heads.unedited == 0


def test_the_figures_are_the_apis(model: HookedTransformer, demo: Demo) -> None:
    check_against_the_api(model, demo)


def test_other_weights_give_other_figures_which_are_again_the_apis(perturbed: HookedTransformer, demo: Demo) -> None:
    other = run_demo(perturbed)
    check_against_the_api(perturbed, other)
    assert other.attended.top != demo.attended.top
    assert all(a.logit_difference != b.logit_difference for a, b in zip(other.lens, demo.lens, strict=True))
    assert (other.ablation.after, other.ablation.kl) != (demo.ablation.after, demo.ablation.kl)
    assert all(a.logit_difference != b.logit_difference for a, b in zip(other.patches, demo.patches, strict=True))


def test_the_embedded_model_solves_the_task(demo: Demo) -> None:
    assert demo.predicted == ANSWER
    assert demo.clean > 3
    assert demo.corrupted < -3
    assert demo.patches[0].restored == pytest.approx(1, abs=1e-3)  # the only differing position, before any mixing
    assert abs(demo.patches[-1].restored) < 0.5  # by the last layer the name has moved on


def test_patching_finds_a_head_that_ablation_shows_to_matter(demo: Demo) -> None:
    """The head whose output restores the answer is one without which the answer is lost; hardly any other is."""
    restored, left = np.asarray(demo.patched_heads.values), np.asarray(demo.ablated_heads.values)
    found = np.unravel_index(restored.argmax(), restored.shape)
    assert restored[found] > 0.5
    lost = left < 0.05 * demo.clean
    assert demo.clean > 3
    assert lost[found]
    assert int(lost.sum()) <= 3


def test_every_figure_is_printed(demo: Demo) -> None:
    out = io.StringIO()
    show_demo(demo, Console(file=out, width=160))
    text = out.getvalue()
    for row in demo.lens:
        assert f"{row.probability:.3f}" in text
        assert f"{row.logit_difference:+.2f}" in text
    for row in demo.patches:
        assert f"{row.logit_difference:+.2f}" in text
        assert f"{row.restored:+.0%}" in text
    for figure in (
        f"{demo.clean:+.2f}",
        f"{demo.ablation.after:+.2f}",
        f"{demo.ablation.kl:.3f}",
        f"{demo.activations}",
    ):
        assert figure in text
    assert asdict(demo)["ablation"]["after"] == demo.ablation.after
