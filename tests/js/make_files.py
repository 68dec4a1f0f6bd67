"""Writes the files that other runtimes open, and what Python computes with the same edits, into a new folder.

python tests/js/make_files.py OUT

No figure of the model is written down here or in the tests: all are computed at once, from the model of the day.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from graphlens import Ablate, HookedTransformer, Patch, Sae, Scale, Steer, embedded_model, expose
from graphlens.deploy import bake_model, write_drivable
from graphlens.edits.spliced_sae import SplicedSae

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests import foreign_files
from tests.families.worded import ENDS, worded_folder

PROMPT = "When John and Mary went to the store, John gave a drink to"
NEW_TOKENS = 16
MARGIN = 1e-3  # between the two likeliest tokens: what float32 rounding cannot bridge


def main(out: Path) -> None:
    out.mkdir(parents=True)
    source = embedded_model()
    model = HookedTransformer.from_onnx(source, "cpu")
    rng = np.random.default_rng(4)
    prompt = model.to_tokens(PROMPT)
    names = [int(model.to_tokens(name, prepend_bos=False)[0, 0]) for name in (" Mary", " John")]

    # Baked: one edit goes into the weights, the others stay as nodes; the last needs a KV cache to tell what is meant.
    _, cache = model.run_with_cache(prompt)
    vector = (3 * rng.standard_normal(model.cfg.d_model) * cache["blocks.2.hook_resid_pre"].std()).astype(np.float32)
    edits = [
        Ablate("blocks.1.attn.hook_z", heads=2),
        Steer("blocks.2.hook_resid_pre", vector, positions=slice(4, None)),
    ]
    generating = [*edits, Steer("blocks.3.hook_resid_pre", vector[::-1], 0.5, positions="generated")]
    bake_model(source, edits, out / "baked")
    bake_model(source, generating, out / "baked-past", with_past=True)
    bake_model(source, generating, out / "baked-transformersjs", with_past=True, layout="transformersjs")
    with mock.patch(
        "graphlens.pipelines.runtimes.EMBEDDABLE", 0
    ):  # as from 2 GB on: the weights in a file of their own
        bake_model(source, generating, out / "baked-transformersjs-large", with_past=True, layout="transformersjs")

    # Drivable: JavaScript's runtimes know required inputs only.
    hook_z, scores = "blocks.1.attn.hook_z", "blocks.2.attn.hook_attn_scores"
    write_drivable(source, "blocks.*.attn.hook_z", out / "tiny-drivable")
    write_drivable(source, ["blocks.*.attn.hook_z", scores], out / "tiny-js", required=True)

    tokens = rng.integers(0, model.cfg.d_vocab, (2, 9))
    added = rng.standard_normal((model.cfg.n_heads, model.cfg.d_head)).astype(np.float32)
    patch = rng.standard_normal((9, model.cfg.n_heads, model.cfg.d_head)).astype(np.float32)
    cases: dict[str, Any] = {
        "plain": [],
        "baked": edits,
        "scale": Ablate(hook_z, heads=2),
        "add": Steer(hook_z, added),
        "where": Patch(hook_z, patch[3:5], positions=[3, 4], batch=1),
        "scores": Scale(scores, 0.0),
    }
    logits = {name: model.run_with_interventions(tokens, case) for name, case in cases.items()}
    assert all(np.abs(logits[name] - logits["plain"]).max() > 0.01 for name in cases if name != "plain")

    generated = _greedy(model, prompt, generating)
    assert generated != _greedy(model, prompt, edits) != _greedy(model, prompt, []), "edits change nothing generated"

    expected = {
        "prompt": PROMPT,
        "prompt_tokens": prompt[0].tolist(),
        "generated": generated,
        "head": {"hook": hook_z, "index": 2, "n_heads": model.cfg.n_heads, "d_head": model.cfg.d_head},
        "scores": scores,
        "tokens": tokens.tolist(),
        "add": added.ravel().tolist(),
        "patch": patch.ravel().tolist(),
        "logits": {name: array.ravel().tolist() for name, array in logits.items()},
        "runs": _runs(model, prompt, names),
        "llama": _llama(out),
        "exposed": _exposed(out),
        "features": _features(out),
        "sae": _sae(out, model, tokens),
    }
    (out / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def _greedy(model: HookedTransformer, prompt: Any, edits: list[Any]) -> list[int]:
    with model.intervene(edits):
        found: list[int] = model.generate(prompt, NEW_TOKENS, do_sample=False, verbose=False)[0].tolist()
    return found


def _llama(out: Path) -> dict[str, Any]:
    """A random Llama, baked for transformers.js, and what it generates: grouped keys that are rotated, several end tokens."""
    folder = worded_folder("llama", out)
    model = HookedTransformer.from_onnx(folder, "cpu")
    vector = np.random.default_rng(0).standard_normal(model.cfg.d_model).astype(np.float32)
    edits = [
        Ablate("blocks.1.attn.hook_z", heads=1),
        Scale("blocks.0.attn.hook_rot_k", 1.5),
        Steer("blocks.1.hook_resid_pre", vector, positions="generated"),
    ]
    bake_model(folder, edits, out / "llama-transformersjs", with_past=True, layout="transformersjs")
    prompt = model.to_tokens(PROMPT)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": ENDS, "return_type": "tokens", "verbose": False}
    with model.intervene(edits):
        generated = model.generate(prompt, NEW_TOKENS, **options)
    assert (generated != model.generate(prompt, NEW_TOKENS, **options)).any(), "edits change nothing generated"
    return {"prompt_tokens": prompt[0].tolist(), "generated": generated[0].tolist()}


def _features(out: Path) -> dict[str, Any]:
    """A drivable file whose gates are the features of an SAE and of a transcoder, a baked one, and the API's logits."""
    source = embedded_model()
    model = HookedTransformer.from_onnx(source, "cpu")
    names = sorted(path.name for path in (source.parent / "tiny-gpt2-saes").iterdir() if path.is_dir())
    resid, mlp = (next(name for name in names if name.endswith(end)) for end in ("resid_post", "mlp_out"))
    saes = [Sae.from_pretrained("tiny-gpt2-saes", name) for name in (resid, mlp)]
    for sae in saes:
        model.add_sae(sae, use_error_term=True)
    tokens = model.to_tokens(PROMPT)
    at = tokens.shape[1] - 1
    hooks = [f"{name}.hook_sae_acts_post" for name in (resid, mlp)]
    plain, cache = model.run_with_cache(tokens)
    strongest = [int(cache[hook][0, at].argmax()) for hook in hooks]
    edits: dict[str, Any] = {
        "scale": [Scale(hooks[0], 3.0, dims=strongest[0])],
        "add": [Steer(hooks[1], 2.5, dims=strongest[1])],
        "where": [Patch(hooks[0], 6.0, dims=strongest[0], positions=[3, at])],
    }
    edits["all"] = [*edits["scale"], *edits["add"]]
    logits = {name: model.run_with_interventions(tokens, case) for name, case in edits.items()}
    assert all(np.abs(found - plain).max() > 0.01 for found in logits.values())
    spliced = [SplicedSae.of(sae, error_term=True) for sae in saes]
    write_drivable(source, hooks, out / "features-js", required=True, saes=spliced)
    bake_model(source, edits["all"], out / "features-baked", saes=spliced)
    return {
        "tokens": tokens[0].tolist(),
        "hooks": hooks,
        "strongest": strongest,
        "widths": [sae.cfg.d_sae for sae in saes],
        "logits": {name: array.ravel().tolist() for name, array in {"plain": plain, **logits}.items()},
    }


def _sae(out: Path, model: HookedTransformer, tokens: Any) -> dict[str, Any]:
    """An SAE inside a baked file with an edit of features, and inside a drivable file whose features are inputs."""
    rng, hook, width, features = np.random.default_rng(5), "blocks.2.hook_resid_post", model.cfg.d_model, 300
    decoder = rng.standard_normal((features, width)).astype(np.float32) / 11
    sae = Sae.from_arrays(decoder.T, np.zeros(features), decoder, np.zeros(width), hook, "topk", k=24)
    inside, post = SplicedSae.of(sae, error_term=True), f"{hook}.hook_sae_acts_post"
    scale = np.where(rng.random(features) < 0.3, 0, 1).astype(np.float32)
    added = (rng.random(features) < 0.02).astype(np.float32) * 4
    edits = [Scale(post, scale), Steer(post, added)]
    bake_model(model.runner.engine.path, edits, out / "sae-baked", saes=inside)
    write_drivable(
        model.runner.engine.path, post, out / "sae-drivable", saes=inside, kinds=("scale", "add"), required=True
    )
    plain = model(tokens)
    with model.saes(sae, use_error_term=True):
        logits = model.run_with_interventions(tokens, edits)
    assert np.abs(logits - plain).max() > 0.01, "the features do nothing"
    return {"post": post, "scale": scale.tolist(), "add": added.tolist(), "logits": logits.ravel().tolist()}


def _exposed(out: Path) -> dict[str, Any]:
    """Another program's model with some of its values as outputs, and those values: the weights lie beside it."""
    file = foreign_files.write(foreign_files.decoder(), out / "foreign" / "model.onnx", "weights.bin")
    names = ["h.1.pattern", "places", "seen"]
    exposed = expose(file, names, out / "exposed").file
    tokens = np.random.default_rng(1).integers(0, foreign_files.VOCAB, (2, 5))
    # From the graph as it was, by ONNX's reference implementation: no optimiser, no graphlens.
    reference = ReferenceEvaluator(_returning(onnx.load(file), names))
    pattern, places, seen = reference.run(names, {"input_ids": tokens})
    assert (exposed.parent / "weights.bin").is_file()
    return {
        "tokens": tokens.tolist(),
        "pattern": np.asarray(pattern).ravel().tolist(),
        "places": np.asarray(places).tolist(),
        "seen": np.asarray(seen).ravel().tolist(),
    }


def _returning(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """A model with other outputs, of no stated type: the reference implementation wants none."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return model


def _runs(model: HookedTransformer, prompt: Any, names: list[int]) -> dict[str, Any]:
    """What the examples of docs/drivable.md show: top token and logit difference, plain and with a head ablated."""
    found: dict[str, Any] = {}
    for run, edits in {"plain": [], "ablated": [Ablate("blocks.1.attn.hook_z", heads=0)]}.items():
        last = model.run_with_interventions(prompt, edits)[0, -1]
        top = int(last.argmax())
        assert np.diff(np.sort(last)[-2:])[0] > MARGIN, f"{run}: two tokens are all but equal: choose another head"
        found[run] = {"top": model.to_string([top]), "difference": float(last[names[0]] - last[names[1]])}
    assert abs(found["plain"]["difference"] - found["ablated"]["difference"]) > MARGIN, "the head does nothing"
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
