"""Files of every family for those who run them without graphlens: plain ONNX Runtime, onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer, bake_model, write_drivable
from graphlens.deploy import write_stripped
from graphlens.interventions import Intervention
from graphlens.pipelines.check import check_folder
from graphlens.surgery.files import seal
from tests.closeness import close
from tests.families.variants import CHOSEN
from tests.families.worded import ENDS, N_CTX, worded_folder

Z = "blocks.1.attn.hook_z"
NEW = 40


@pytest.fixture(scope="module", params=CHOSEN)
def folder(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Path:
    return family_folder(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedTransformer:
    return HookedTransformer.from_onnx(folder, "cpu")


def prompts(batch: int = 3, length: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 101, (batch, length))


def masked() -> np.ndarray:
    mask = np.ones((3, 12), np.int64)
    mask[0, :5], mask[1, :2] = 0, 0
    return mask


def edits(model: HookedTransformer) -> list[list[Intervention]]:
    """Sets of interventions: those that go into weights where an architecture lets them, and those that stay nodes."""
    cfg, rng = model.cfg, np.random.default_rng(5)
    vector = rng.standard_normal(cfg.d_model).astype(np.float32)
    keys = rng.standard_normal((cfg.n_key_value_heads, cfg.d_head)).astype(np.float32)
    found: list[list[Intervention]] = [
        [Ablate(Z, heads=1), Steer("blocks.1.hook_mlp_out", vector)],
        [Scale("blocks.0.attn.hook_k", -1.5), Steer("blocks.1.attn.hook_v", keys), Scale("blocks.2.attn.hook_q", 0.5)],
        [Scale("blocks.0.hook_mlp_out", 0.5, dims=slice(3, 30)), Scale("blocks.2.hook_attn_out", 2.0)],
        [Steer("blocks.2.hook_resid_pre", vector, positions=slice(4, None))],
    ]
    if "blocks.0.mlp.hook_post" in model.hook_dict:
        found[2].append(Scale("blocks.0.mlp.hook_post", 0.5, dims=slice(3, 60)))
        found[3].append(Patch("blocks.1.mlp.hook_pre", 0.3, dims=2))
    special = ["attn.hook_rot_k", "mlp.hook_pre_linear", "attn.q_norm.hook_scale", "attn.k_norm.hook_normalized"]
    special += ["ln1_post.hook_normalized", "ln2.hook_normalized", "embed.ln.hook_scale"]
    special += ["mlp.hook_expert_weights"]
    names = [name for part in special for name in (f"blocks.1.{part}", part) if name in model.hook_dict]
    return [*found, [Scale(name, 1.5) for name in names]]


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / "model.onnx", options)


def cached(
    run: onnxruntime.InferenceSession, model: HookedTransformer, tokens: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """The logits of a file with a KV cache, fed in three pieces."""
    cfg = model.cfg
    shape = (len(tokens), cfg.n_key_value_heads, 0, cfg.d_head)
    past = {
        f"past_key_values.{i}.{part}": np.zeros(shape, np.float32)
        for i in range(cfg.n_layers)
        for part in ("key", "value")
    }
    names = [output.name for output in run.get_outputs()]
    positions, logits = np.maximum(mask.cumsum(-1) - 1, 0), []
    for start, end in ((0, 6), (6, 7), (7, tokens.shape[1])):
        feeds = {
            "input_ids": tokens[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        found = dict(zip(names, run.run(None, feeds | past), strict=True))
        logits.append(found.pop("logits"))
        past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
    return np.concatenate(logits, 1)


def test_a_baked_file_does_what_the_run_time_edits_do(model: HookedTransformer, folder: Path, tmp_path: Path) -> None:
    tokens, mask = prompts(), masked()
    plain = model.forward(tokens)
    for number, items in enumerate(edits(model)):
        expected = model.run_with_interventions(tokens, items)
        assert number == 4 or np.abs(expected - plain).max() > 1e-2
        bake_model(folder, items, tmp_path / str(number), announce=lambda _: None)
        run = session(tmp_path / str(number))
        assert [output.name for output in run.get_outputs()] == ["logits"]
        close(run.run(None, {"input_ids": tokens})[0], expected)
        expected = model.run_with_interventions(tokens, items, attention_mask=mask)
        (found,) = run.run(None, {"input_ids": tokens, "attention_mask": mask})
        close(found[mask == 1], expected[mask == 1])


def test_a_baked_file_with_a_cache_does_so_too(model: HookedTransformer, folder: Path, tmp_path: Path) -> None:
    tokens, mask = prompts(), masked()
    items = [item for some in edits(model) for item in some]
    bake_model(folder, items, tmp_path / "baked", with_past=True, announce=lambda _: None)
    expected = model.run_with_interventions(tokens, items, attention_mask=mask)
    found = cached(session(tmp_path / "baked"), model, tokens, mask)
    close(found[mask == 1], expected[mask == 1])


def test_a_stripped_file_is_the_plain_model(model: HookedTransformer, folder: Path, tmp_path: Path) -> None:
    write_stripped(folder, tmp_path / "plain", announce=lambda _: None)
    (found,) = session(tmp_path / "plain").run(None, {"input_ids": prompts()})
    close(found, model.forward(prompts()))


@pytest.mark.parametrize("with_past", [False, True])
def test_a_drivable_file_is_edited_through_its_inputs(
    with_past: bool, model: HookedTransformer, folder: Path, tmp_path: Path
) -> None:
    cfg, tokens = model.cfg, prompts()
    gates = ["blocks.*.attn.hook_z", "blocks.*.attn.hook_[kv]", "blocks.*.hook_resid_post", "*.q_norm.hook_scale"]
    gates = [gate for gate in gates if "q_norm" not in gate or cfg.use_qk_norm]
    names = write_drivable(folder, gates, tmp_path / "drivable", with_past=with_past, announce=lambda _: None)
    assert len(names) == cfg.n_layers * (5 if cfg.use_qk_norm else 4)
    run = session(tmp_path / "drivable")
    off, added = np.ones((1, 1, cfg.n_heads, 1), np.float32), np.full((1, 1, cfg.n_key_value_heads, 1), 0.5, np.float32)
    off[0, 0, 1] = 0
    driven = {f"{Z}/scale": off, "blocks.0.attn.hook_k/add": added}
    expected = model.run_with_interventions(tokens, [Ablate(Z, heads=1), Steer("blocks.0.attn.hook_k", 0.5)])
    feeds: dict[str, Any] = {"input_ids": tokens, **driven}
    if with_past:
        feeds |= {"attention_mask": np.ones_like(tokens), "position_ids": np.arange(12)[None].repeat(3, 0)}
        nothing = np.zeros((3, cfg.n_key_value_heads, 0, cfg.d_head), np.float32)
        feeds |= {f"past_key_values.{i}.{part}": nothing for i in range(cfg.n_layers) for part in ("key", "value")}
    close(run.run(["logits"], feeds)[0], expected)


def test_a_file_is_checked_and_sealed(folder: Path, tmp_path: Path) -> None:
    import shutil

    found = check_folder(folder, run=True)
    assert found.graph.added_operators == ()
    assert found.trial is not None
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    report = seal(copy)
    assert report.nodes == found.graph.nodes
    close(
        HookedTransformer.from_onnx(copy, "cpu").forward(prompts()),
        HookedTransformer.from_onnx(folder, "cpu").forward(prompts()),
    )


# onnxruntime-genai


def generated(folder: Path, tokens: list[int], length: int) -> list[int]:
    """What onnxruntime-genai generates."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=length)
    generator = og.Generator(model, options)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def test_genai_generates_what_generate_does(model: HookedTransformer, folder: Path, tmp_path: Path) -> None:
    items = [item for some in edits(model) for item in some]
    items.append(Steer("blocks.1.hook_resid_pre", 0.3, positions="generated"))
    bake_model(folder, items, tmp_path / "baked", with_past=True, announce=lambda _: None)
    tokens, short = prompts(1), model.cfg.rotary_short
    new = NEW if short is None else short - 12  # the context that is stated: beyond it cached keys would be others
    with model.intervene(items):
        made = model.generate(tokens, new, do_sample=False, eos_token_id=0, return_type="tokens", verbose=False)
    expected = made[0].tolist()
    if expected[-1] == 0:
        expected.pop()  # genai ends before it puts the end token down
    assert generated(tmp_path / "baked", tokens[0].tolist(), 12 + new) == expected


def test_genai_reads_the_tokenizer_the_end_tokens_and_the_length_that_a_checkpoint_states(
    families_root: Path, tmp_path: Path
) -> None:
    import onnxruntime_genai as og

    folder = worded_folder("llama", families_root)
    out = bake_model(folder, [], tmp_path / "baked", with_past=True, announce=lambda _: None)
    stated = json.loads((out / "genai_config.json").read_text())
    assert stated["model"]["eos_token_id"] == ENDS
    assert stated["model"]["context_length"] == stated["search"]["max_length"] == N_CTX
    model = HookedTransformer.from_onnx(folder, "cpu")
    text = "When John and Mary went to the store"
    tokens = og.Tokenizer(og.Model(str(out))).encode(text).tolist()
    assert tokens == model.to_tokens(text, prepend_bos=False)[0].tolist()
    expected = model.generate(
        np.asarray([tokens]), 30, do_sample=False, eos_token_id=ENDS, return_type="tokens", verbose=False
    )
    assert generated(out, tokens, len(tokens) + 30) == expected[0].tolist()
