"""Files with SAEs inside: baked, drivable, saved and opened again, also by commands; all give the API's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from graphlens import HookedTransformer, InputError, Scale, Steer, bake_model, surgery, write_drivable
from graphlens.edits.files import save as save_edits
from graphlens.edits.spliced_sae import SplicedSae
from graphlens.file.manifest import METADATA_KEY
from tests.command_line import graphlens
from tests.saes.odd_model import TOKENS, folder, model
from tests.saes.sae_cases import D_SAE, MLP_OUT, NORMED, RESID, Z, made

POST = f"{RESID}.hook_sae_acts_post"
EDITS = [Scale(POST, 2.5, dims=[7]), Steer(POST, 1.5, dims=[3])]
SAES = {
    "topk": made(1, hook=RESID, architecture="topk", k=6),
    "gated": made(2, hook=RESID, architecture="gated"),
    "normalised": made(3, hook=RESID, architecture="jumprelu", normalize_activations="layer_norm"),
}
each = pytest.mark.parametrize(("name", "error_term"), [(name, error) for name in SAES for error in (False, True)])


@pytest.fixture(scope="module")
def odd() -> HookedTransformer:
    return model()


def opened(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


def close(found: Any, expected: Any) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))


def gates(scale: float, added: float) -> dict[str, Any]:
    """What EDITS come to as inputs."""
    factor, addend = np.ones((1, 1, D_SAE), np.float32), np.zeros((1, 1, D_SAE), np.float32)
    factor[..., 7], addend[..., 3] = scale, added
    return {f"{POST}/scale": factor, f"{POST}/add": addend}


@each
def test_baked_is_drivable_is_api(odd: HookedTransformer, tmp_path: Path, name: str, error_term: bool) -> None:
    sae, source = SAES[name], odd.runner.engine.path
    with odd.saes(sae, use_error_term=error_term):
        expected, plain = odd.run_with_interventions(TOKENS, EDITS), odd(TOKENS)
        odd.bake(EDITS, tmp_path / "baked")
    assert np.abs(expected - plain).max() > 1e-2
    close(opened(tmp_path / "baked" / "model.onnx").run(["logits"], {"input_ids": TOKENS})[0], expected)
    inside = SplicedSae.of(sae, error_term)
    bake_model(source, EDITS, tmp_path / "again", saes=[inside])
    for file in (tmp_path / "baked").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert write_drivable(source, POST, tmp_path / "drivable", saes=inside, required=True, kinds=["scale", "add"]) == [
        POST
    ]
    session = opened(tmp_path / "drivable" / "model.onnx")
    close(session.run(["logits"], {"input_ids": TOKENS, **gates(2.5, 1.5)})[0], expected)
    close(session.run(["logits"], {"input_ids": TOKENS, **gates(1, 0)})[0], plain)
    onnx.checker.check_model(str(tmp_path / "drivable" / "model.onnx"))
    assert {domain.domain for domain in onnx.load(tmp_path / "baked" / "model.onnx").opset_import} <= {"", "ai.onnx"}


@each
def test_hooked_files_have_the_hook_points(odd: HookedTransformer, tmp_path: Path, name: str, error_term: bool) -> None:
    sae = SAES[name]
    with odd.saes(sae, use_error_term=error_term):
        logits, cache = odd.run_with_cache(TOKENS)
        edited = odd.run_with_interventions(TOKENS, EDITS)
        odd.bake([], tmp_path / "baked", keep_hooks=True)
    surgery.save(surgery.with_sae(surgery.load(folder()), sae, error_term), tmp_path / "saved")
    for place in ("baked", "saved"):
        again = HookedTransformer.from_onnx(tmp_path / place)
        found, values = again.run_with_cache(TOKENS)
        close(found, logits)
        assert list(values) == list(cache)
        for hook in (hook for hook in values if not hook.endswith("hook_attn_scores")):  # masked ones are -inf
            close(values[hook], cache[hook])
        close(again.run_with_interventions(TOKENS, EDITS), edited)
        manifest = json.loads(surgery.load(tmp_path / place).metadata_props[METADATA_KEY])
        assert manifest["format_version"] == 5
        assert manifest["hooks"][POST]["width"] == D_SAE
        surgery.check(tmp_path / place)
        again.set_use_attn_result(True)
        assert [hook for hook in again.runner.names() if "hook_sae" in hook] == [
            hook for hook in cache if "hook_sae" in hook
        ]
        with pytest.raises(InputError, match="already"):
            again.add_sae(sae)


def test_a_kv_cache_and_tokens_that_are_left_out(odd: HookedTransformer, tmp_path: Path) -> None:
    special = int(TOKENS[0, 2])
    sae = SAES["topk"]
    with odd.saes(sae, exclude_special_tokens=[special]):
        expected = odd(TOKENS)
        odd.bake(Steer(POST, 3.0, dims=[4]), tmp_path / "past", with_past=True)
        edited = odd.run_with_interventions(TOKENS, Steer(POST, 3.0, dims=[4]))
    assert np.abs(expected - edited).max() > 1e-2
    session = opened(tmp_path / "past" / "model.onnx")
    shape = (2, odd.cfg.n_heads, 0, odd.cfg.d_head)
    past = {name.name: np.zeros(shape, np.float32) for name in session.get_inputs() if name.name.startswith("past")}
    found = []
    names = [value.name for value in session.get_outputs()]
    for start, stop in ((0, 4), (4, 6)):
        feeds = {
            "input_ids": TOKENS[:, start:stop], "attention_mask": np.ones((2, stop), np.int64),
            "position_ids": np.broadcast_to(np.arange(start, stop), (2, stop - start)).copy(), **past,
        }  # fmt: skip
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        found.append(outputs["logits"])
        past = {
            name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"
        }
    close(np.concatenate(found, 1), edited)


def test_several_and_a_transcoder_in_one_file(odd: HookedTransformer, tmp_path: Path) -> None:
    saes = [
        SAES["gated"],
        made(5, hook=NORMED, hook_out=MLP_OUT, architecture="skip_transcoder"),
        made(6, hook=Z, reshape_activations="hook_z"),
    ]
    with odd.saes(saes):
        expected = odd(TOKENS)
        odd.bake([], tmp_path / "baked")
        odd.bake([], tmp_path / "js", layout="transformersjs")
    close(opened(tmp_path / "baked" / "model.onnx").run(["logits"], {"input_ids": TOKENS})[0], expected)
    close(opened(tmp_path / "js" / "onnx" / "model.onnx").run(["logits"], {"input_ids": TOKENS})[0], expected)
    assert len(list((tmp_path / "baked").glob("sae-*.safetensors"))) == 3
    assert not list((tmp_path / "js").glob("*.safetensors"))


def test_edits_beside_an_sae_are_not_folded_across_it(odd: HookedTransformer, tmp_path: Path) -> None:
    """What is added behind an SAE is not what its SAE would see."""
    vector = np.linspace(-1, 1, odd.cfg.d_model).astype(np.float32)
    for hook in (RESID, "blocks.2.hook_resid_pre", MLP_OUT):
        with odd.saes(SAES["gated"]):
            expected = odd.run_with_interventions(TOKENS, Steer(hook, vector))
            odd.bake(Steer(hook, vector), tmp_path / hook)
        close(opened(tmp_path / hook / "model.onnx").run(["logits"], {"input_ids": TOKENS})[0], expected)


def test_a_features_steering_alone_needs_no_sae(odd: HookedTransformer, tmp_path: Path) -> None:
    """With an error term, adding to a feature adds its row of the decoder: that goes into a bias."""
    sae = SAES["gated"]
    with odd.saes(sae, use_error_term=True):
        expected = odd.run_with_interventions(TOKENS, Steer(POST, 4.0, dims=[17]))
    bake_model(odd.runner.engine.path, Steer(RESID, 4 * sae.W_dec[17]), tmp_path / "steered")
    close(opened(tmp_path / "steered" / "model.onnx").run(["logits"], {"input_ids": TOKENS})[0], expected)
    plain = onnx.load(tmp_path / "steered" / "model.onnx", load_external_data=False).graph.node
    bake_model(odd.runner.engine.path, [], tmp_path / "plain")
    assert len(plain) == len(onnx.load(tmp_path / "plain" / "model.onnx", load_external_data=False).graph.node)


def test_the_command_line(odd: HookedTransformer, tmp_path: Path) -> None:
    sae = SAES["topk"]
    sae.save(tmp_path / "sae")
    save_edits(EDITS, tmp_path / "edits.json")
    inside = ("--sae", tmp_path / "sae", "--error-term")
    assert graphlens("bake", folder(), tmp_path / "edits.json", "-o", tmp_path / "baked", *inside).returncode == 0
    assert graphlens("drivable", folder(), "--gates", POST, "-o", tmp_path / "driven", *inside).returncode == 0
    with odd.saes(sae, use_error_term=True):
        expected = odd.run_with_interventions(TOKENS, EDITS)
    close(opened(tmp_path / "baked" / "model.onnx").run(["logits"], {"input_ids": TOKENS})[0], expected)
    fed = {"input_ids": TOKENS, **gates(2.5, 1.5)}
    close(opened(tmp_path / "driven" / "model.onnx").run(["logits"], fed)[0], expected)
    assert (
        graphlens("bake", folder(), tmp_path / "edits.json", "-o", tmp_path / "without").returncode == 1
    )  # no such hook point


def test_weights_are_not_copied_into_graphs(odd: HookedTransformer) -> None:
    """A graph with an SAE is as small as its nodes; the arrays in it are the SAE's own."""
    import onnx_ir as ir

    from graphlens.file.held import held_arrays

    sae = made(7, hook=RESID, d_sae=4000)
    graph = surgery.with_sae(surgery.load(folder()), sae)
    arrays = held_arrays(graph)
    assert np.shares_memory(arrays[f"{RESID}/sae/W_enc"], sae.W_enc)
    assert len(ir.to_proto(graph).SerializeToString()) < sae.W_enc.nbytes / 2
