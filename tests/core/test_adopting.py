"""A file that another program exported, adopted: every hook point, edit and output beside NumPy and beside the file itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from graphlens import Ablate, HookedTransformer, KeyValueCache, ModelFileError, Patch, Scale, adopt, surgery
from graphlens.errors import InputError
from graphlens.pipelines.adopt import AdoptReport
from graphlens.pipelines.deploy import write_drivable, write_stripped
from tests.foreign_decoder import D_HEAD, HEADS, INT32, LAYERS, POSITIONS, VOCAB, decoder, forward

IDS = np.random.default_rng(1).integers(0, VOCAB, (2, 7))
PADDED = np.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
CLOSE = {"rtol": 0, "atol": 2e-5}  # float32 beside float64; numbers of about 10


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("original") / "model.onnx")


@pytest.fixture(scope="module")
def report(original: Path, tmp_path_factory: pytest.TempPathFactory) -> AdoptReport:
    return adopt(original, tmp_path_factory.mktemp("adopted") / "hooked", announce=lambda _: None)


@pytest.fixture(scope="module")
def model(report: AdoptReport) -> HookedTransformer:
    assert report.folder is not None
    return HookedTransformer.from_onnx(report.folder, "cpu")


def run(file: Path, ids: np.ndarray, mask: np.ndarray | None = None, past: dict[str, np.ndarray] | None = None) -> Any:
    """What the file itself gives: (logits, past for the next run)."""
    session = onnxruntime.InferenceSession(file)
    if past is None:
        past = {
            f"past.{layer}.{part}": np.zeros((len(ids), HEADS, 0, D_HEAD), np.float32)
            for layer in range(LAYERS)
            for part in ("key", "value")
        }
    before = past["past.0.key"].shape[2]
    mask = np.ones((len(ids), before + ids.shape[1]), np.int64) if mask is None else mask
    positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, before:]
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feeds), strict=True))
    return found.pop("scores"), {name.replace("now", "past"): array for name, array in found.items()}


def outputs(folder: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def visible(value: np.ndarray) -> np.ndarray:
    """Masked scores are as low as each program likes."""
    return np.where(value < -1e30, -np.inf, value)


# What is found


def test_every_hook_point_of_a_gpt_is_found_and_holds_what_numpy_computes(model: HookedTransformer) -> None:
    logits, cache = model.run_with_cache(IDS)
    expected, hooks, _ = forward(IDS)
    assert set(cache) == set(hooks)
    np.testing.assert_allclose(logits, expected, **CLOSE)
    for name, value in hooks.items():
        np.testing.assert_allclose(visible(cache[name]), visible(value), err_msg=name, **CLOSE)


def test_padding_on_the_left_is_masked_and_not_counted(model: HookedTransformer) -> None:
    logits, cache = model.run_with_cache(IDS, attention_mask=PADDED)
    expected, hooks, _ = forward(IDS, PADDED)
    real = PADDED != 0
    np.testing.assert_allclose(logits[real], expected[real], **CLOSE)
    for name in ("hook_pos_embed", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"):
        np.testing.assert_allclose(cache[name][real], hooks[name][real], err_msg=name, **CLOSE)


def test_the_original_is_untouched_and_known_by_its_digest(original: Path, report: AdoptReport) -> None:
    digest = hashlib.sha256(original.read_bytes()).hexdigest()
    assert (report.adopted.sha256, report.adopted.size) == (digest, original.stat().st_size)
    assert report.folder is not None
    manifest = surgery.read_manifest(surgery.load(report.folder))
    assert manifest.adopted == report.adopted
    assert manifest.adopted.file == "model.onnx"
    assert manifest.adopted.data == {}
    assert manifest.adopted.expanded == {"LayerNormalization": 2 * LAYERS + 1}
    assert manifest.adopted.inputs == ("attention_mask", "position_ids", "past")
    assert json.loads(manifest.to_json())["format_version"] == 4
    assert decoder(original.with_name("again.onnx")).read_bytes() == original.read_bytes()


def test_a_dry_run_reports_the_same_and_writes_nothing(original: Path, report: AdoptReport, tmp_path: Path) -> None:
    before = sorted(original.parent.iterdir())
    dry = adopt(original, dry_run=True, announce=lambda _: None)
    assert (dry.hooks, dry.adopted, dry.folder) == (report.hooks, report.adopted, None)
    assert sorted(original.parent.iterdir()) == before


def test_weights_in_a_file_beside_it_are_moved(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = decoder(tmp_path / "in" / "model.onnx", external=True)
    report = adopt(file, tmp_path / "out", announce=lambda _: None)
    digests = {item.name: hashlib.sha256(item.read_bytes()).hexdigest() for item in (tmp_path / "in").iterdir()}
    assert digests == {"model.onnx": report.adopted.sha256, **report.adopted.data}
    assert list(report.adopted.data) == ["model.onnx.data"]
    assert surgery.read_manifest(surgery.load(tmp_path / "out")).adopted == report.adopted
    for item in (tmp_path / "in").iterdir():
        item.unlink()
    np.testing.assert_allclose(HookedTransformer.from_onnx(tmp_path / "out", "cpu")(IDS), forward(IDS)[0], **CLOSE)


def test_inputs_may_be_left_out_or_fed(report: AdoptReport) -> None:
    assert report.folder is not None
    alone = outputs(report.folder, {"input_ids": IDS})
    empty = np.zeros((2, HEADS, 0, D_HEAD), np.float32)
    past = {f"past_key_values.{layer}.{part}": empty for layer in range(LAYERS) for part in ("key", "value")}
    positions = np.tile(np.arange(7), (2, 1))
    all_ = outputs(
        report.folder, {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": positions, **past}
    )
    for name, value in alone.items():
        np.testing.assert_array_equal(all_[name], value, err_msg=name)
    later = outputs(report.folder, {"input_ids": IDS, "position_ids": positions + 3})
    np.testing.assert_allclose(later["logits"], forward(IDS, positions=positions + 3)[0], **CLOSE)


# Edits


def halved(name: str, value: np.ndarray) -> np.ndarray:
    if name == "blocks.0.attn.hook_q":
        value[:, :, 2] *= 0.5
    return value


@pytest.mark.parametrize(
    "hook",
    [
        *("hook_embed", "blocks.1.hook_resid_pre", "blocks.0.ln1.hook_scale", "blocks.1.ln2.hook_normalized"),
        *(f"blocks.1.attn.hook_{name}" for name in ("q", "k", "v", "pattern", "z")),
        *("blocks.0.hook_attn_out", "blocks.0.mlp.hook_pre", "blocks.1.mlp.hook_post", "ln_final.hook_normalized"),
    ],
)
def test_an_edit_is_the_same_edit_in_numpy_as_function_as_data_and_as_file(
    model: HookedTransformer, hook: str, tmp_path: Path
) -> None:
    def doubled(name: str, value: np.ndarray) -> np.ndarray:
        return value * 1.5 if name == hook else value

    expected = forward(IDS, edit=doubled)[0]
    assert np.abs(expected - forward(IDS)[0]).max() > 1e-3
    by_function = model.run_with_hooks(IDS, fwd_hooks=[(hook, lambda value, hook: value * 1.5)])
    by_data = model.run_with_interventions(IDS, [Scale(hook, 1.5)])
    model.bake([Scale(hook, 1.5)], tmp_path / "baked")
    baked = outputs(tmp_path / "baked", {"input_ids": IDS})
    assert set(baked) == {"logits"}
    for found in (by_function, by_data, baked["logits"]):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_one_head_of_a_query_is_edited_in_its_layout(model: HookedTransformer) -> None:
    found = model.run_with_interventions(IDS, [Scale("blocks.0.attn.hook_q", 0.5, heads=2)])
    np.testing.assert_allclose(found, forward(IDS, edit=halved)[0], **CLOSE)


def test_hook_points_that_share_a_value_fire_in_order(model: HookedTransformer) -> None:
    first, second = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
    other = np.random.default_rng(5).normal(size=(2, 7, HEADS * D_HEAD)).astype(np.float32)
    both = [(first, lambda value, hook: value + 1), (second, lambda value, hook: other)]
    with model.hooks(fwd_hooks=both):
        logits, cache = model.run_with_cache(IDS)
    np.testing.assert_allclose(cache[first], forward(IDS)[1][first] + 1, **CLOSE)
    np.testing.assert_array_equal(cache[second], other)
    patched = model.run_with_interventions(IDS, [Patch(second, other)])
    np.testing.assert_allclose(logits, patched, **CLOSE)


def test_an_edit_of_scores_leaves_masked_ones_masked(model: HookedTransformer, tmp_path: Path) -> None:
    items = [Ablate("blocks.0.attn.hook_attn_scores")]

    def flat(name: str, value: np.ndarray) -> np.ndarray:
        return np.where(value < -1e30, value, 0) if name == "blocks.0.attn.hook_attn_scores" else value

    expected = forward(IDS, edit=flat)[0]
    np.testing.assert_allclose(model.run_with_interventions(IDS, items), expected, **CLOSE)
    model.bake(items, tmp_path / "baked")
    np.testing.assert_allclose(outputs(tmp_path / "baked", {"input_ids": IDS})["logits"], expected, **CLOSE)


def test_a_gate_drives_the_file(report: AdoptReport, tmp_path: Path) -> None:
    assert report.folder is not None
    write_drivable(report.folder, "blocks.1.attn.hook_z", tmp_path / "driven", announce=lambda _: None)
    scale = np.ones((1, 1, HEADS, 1), np.float32)
    scale[:, :, 1] = 0
    driven = outputs(tmp_path / "driven", {"input_ids": IDS, "blocks.1.attn.hook_z/scale": scale})

    def without(name: str, value: np.ndarray) -> np.ndarray:
        return value * scale if name == "blocks.1.attn.hook_z" else value

    np.testing.assert_allclose(driven["logits"], forward(IDS, edit=without)[0], **CLOSE)


# Past keys and values


def test_the_stripped_file_gives_what_the_original_gives(original: Path, report: AdoptReport, tmp_path: Path) -> None:
    assert report.folder is not None
    write_stripped(report.folder, tmp_path / "plain", announce=lambda _: None)
    first, past = run(original, IDS[:, :4])
    ours = outputs(tmp_path / "plain", {"input_ids": IDS[:, :4]})
    np.testing.assert_allclose(ours.pop("logits"), first, **CLOSE)
    assert {name.replace("present", "past") for name in ours} == set(past)
    for name, value in ours.items():
        np.testing.assert_allclose(value, past[name.replace("present", "past")], **CLOSE)
    second, _ = run(original, IDS[:, 4:], past=past)
    kept = {name.replace("present", "past_key_values"): value for name, value in ours.items()}
    later = outputs(tmp_path / "plain", {"input_ids": IDS[:, 4:], **kept})
    np.testing.assert_allclose(later["logits"], second, **CLOSE)


@pytest.mark.parametrize("cached", [True, False])
def test_generation_is_the_originals_greedy_one(original: Path, model: HookedTransformer, cached: bool) -> None:
    found = model.generate(
        IDS, 5, do_sample=False, stop_at_eos=False, verbose=False, use_past_kv_cache=cached, attention_mask=PADDED
    )
    tokens, mask = IDS, PADDED
    for _ in range(5):
        tokens = np.concatenate([tokens, run(original, tokens, mask)[0][:, -1].argmax(-1)[:, None]], 1)
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
    np.testing.assert_array_equal(found, tokens)


def test_a_kv_cache_goes_on_where_a_run_ended(model: HookedTransformer) -> None:
    cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
    model(IDS[:, :4], past_kv_cache=cache, attention_mask=PADDED[:, :4])
    logits, found = model.run_with_cache(IDS[:, 4:], past_kv_cache=cache, attention_mask=PADDED[:, 4:])
    expected, hooks, _ = forward(IDS, PADDED)
    np.testing.assert_allclose(logits, expected[:, 4:], **CLOSE)
    np.testing.assert_allclose(found["blocks.1.attn.hook_k"], hooks["blocks.1.attn.hook_k"][:, 4:], **CLOSE)
    np.testing.assert_allclose(
        found["blocks.1.attn.hook_pattern"], hooks["blocks.1.attn.hook_pattern"][:, :, 4:], **CLOSE
    )


def test_an_edit_by_position_is_baked_for_whole_prompts_and_for_steps(model: HookedTransformer, tmp_path: Path) -> None:
    items = [Ablate("blocks.0.hook_attn_out", positions=[2, 5])]

    def ablated(name: str, value: np.ndarray) -> np.ndarray:
        if name == "blocks.0.hook_attn_out":
            value[:, [2, 5]] = 0
        return value

    expected = forward(IDS, edit=ablated)[0]
    model.bake(items, tmp_path / "whole")
    np.testing.assert_allclose(outputs(tmp_path / "whole", {"input_ids": IDS})["logits"], expected, **CLOSE)
    model.bake(items, tmp_path / "steps", with_past=True)
    first = outputs(tmp_path / "steps", {"input_ids": IDS[:, :4]})
    kept = {name.replace("present", "past_key_values"): value for name, value in first.items() if name != "logits"}
    second = outputs(tmp_path / "steps", {"input_ids": IDS[:, 4:], **kept})
    np.testing.assert_allclose(np.concatenate([first["logits"], second["logits"]], 1), expected, **CLOSE)


def test_a_file_without_past_generates_without_a_cache_and_refuses_one(tmp_path: Path) -> None:
    adopt(decoder(tmp_path / "model.onnx", past=False), tmp_path / "out", announce=lambda _: None)
    model = HookedTransformer.from_onnx(tmp_path / "out", "cpu")
    found = model.generate(IDS, 4, do_sample=False, stop_at_eos=False, verbose=False)
    tokens = IDS
    for _ in range(4):
        tokens = np.concatenate([tokens, forward(tokens)[0][:, -1].argmax(-1)[:, None]], 1)
    np.testing.assert_array_equal(found, tokens)
    with pytest.raises(InputError, match="takes no past keys and values"):
        model(IDS, past_kv_cache=KeyValueCache.init_cache(model.cfg, batch_size=2))
    model.bake([Ablate("blocks.0.hook_attn_out", positions=[2])], tmp_path / "baked")
    with pytest.raises(InputError, match="takes no past keys and values"):
        model.bake([], tmp_path / "steps", with_past=True)


# Other files


def test_inputs_of_another_type_are_cast(tmp_path: Path) -> None:
    adopt(decoder(tmp_path / "model.onnx", integers=INT32), tmp_path / "out", announce=lambda _: None)
    model = HookedTransformer.from_onnx(tmp_path / "out", "cpu")
    np.testing.assert_allclose(model(IDS, attention_mask=PADDED)[1, 2:], forward(IDS, PADDED)[0][1, 2:], **CLOSE)


def test_names_that_mean_something_else_in_a_hooked_file_give_way(tmp_path: Path) -> None:
    import onnx

    file = decoder(tmp_path / "model.onnx")
    made = onnx.load(file)
    new = {"v9": "mask", "v10": "positions", "v20": "blocks.0.hook_resid_pre", "v30": "logits", "v15": "residual"}
    for node in made.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    onnx.save(made, file)
    adopt(file, tmp_path / "out", announce=lambda _: None)
    model = HookedTransformer.from_onnx(tmp_path / "out", "cpu")
    expected, hooks, _ = forward(IDS)
    logits, cache = model.run_with_cache(IDS)
    np.testing.assert_allclose(logits, expected, **CLOSE)
    for name, value in hooks.items():
        np.testing.assert_allclose(visible(cache[name]), visible(value), err_msg=name, **CLOSE)


def test_a_file_without_a_mask_refuses_padding(tmp_path: Path) -> None:
    report = adopt(decoder(tmp_path / "model.onnx", masked=False), tmp_path / "out", announce=lambda _: None)
    assert any("takes no attention_mask" in note for note in report.adopted.notes)
    model = HookedTransformer.from_onnx(tmp_path / "out", "cpu")
    np.testing.assert_allclose(model(IDS), forward(IDS)[0], **CLOSE)
    with pytest.raises(InputError, match="has no input attention_mask"):
        model(IDS, attention_mask=PADDED)


def test_a_file_that_counts_padding_is_said_to(tmp_path: Path) -> None:
    report = adopt(decoder(tmp_path / "model.onnx", positioned=False), tmp_path / "out", announce=lambda _: None)
    assert any("counts padding on the left as positions" in note for note in report.adopted.notes)
    model = HookedTransformer.from_onnx(tmp_path / "out", "cpu")
    positions = np.tile(np.arange(7), (2, 1))
    expected = forward(IDS, PADDED, positions)[0]
    np.testing.assert_allclose(model(IDS, attention_mask=PADDED)[1, 2:], expected[1, 2:], **CLOSE)


def test_a_file_without_a_head_is_read_and_gives_no_logits(tmp_path: Path) -> None:
    file = decoder(tmp_path / "model.onnx", logits=False)
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps({"vocab_size": VOCAB}))
    report = adopt(file, tmp_path / "out", announce=lambda _: None)
    assert report.adopted.headless
    model = HookedTransformer.from_onnx(tmp_path / "out", "cpu")
    result, cache = model.run_with_cache(IDS)
    assert result is None
    np.testing.assert_allclose(cache["blocks.1.hook_resid_post"], forward(IDS)[1]["blocks.1.hook_resid_post"], **CLOSE)
    np.testing.assert_allclose(model(IDS, stop_at_layer=1), forward(IDS)[1]["blocks.1.hook_resid_pre"], **CLOSE)
    for refused in (
        lambda: model(IDS),
        lambda: model(IDS, return_type="loss"),
        lambda: model.generate(IDS, 2, stop_at_eos=False, verbose=False),
        lambda: model.run_with_interventions(IDS, [Ablate("blocks.0.hook_attn_out")]),
    ):
        with pytest.raises(InputError, match="ends in hidden states and gives no logits"):
            refused()


# Refusals


def test_another_models_config_is_refused(original: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "config.json"
    wrong.write_text(json.dumps({"num_hidden_layers": LAYERS, "n_head": HEADS + 2, "n_positions": 99}))
    with pytest.raises(ModelFileError, match=f"n_heads {HEADS + 2} .the file has {HEADS}"):
        adopt(original, tmp_path / "out", config=wrong, announce=lambda _: None)
    assert not (tmp_path / "out").exists()
    right = {
        "n_head": HEADS,
        "activation_function": "relu",
        "architectures": ["GPT2LMHeadModel"],
        "layer_norm_epsilon": 1e-4,
    }
    wrong.write_text(json.dumps(right))
    config = adopt(original, dry_run=True, config=tmp_path, announce=lambda _: None).config
    assert (config.act_fn, config.original_architecture, config.eps) == ("relu", "GPT2LMHeadModel", 1e-4)
    with pytest.raises(ModelFileError, match="no such file"):
        adopt(original, dry_run=True, config=tmp_path / "absent.json", announce=lambda _: None)
    wrong.write_text("[]")
    with pytest.raises(ModelFileError, match=r"no config.json of a model"):
        adopt(original, dry_run=True, config=wrong, announce=lambda _: None)


def test_dropout_in_training_mode_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    file = decoder(tmp_path / "model.onnx")
    made = onnx.load(file)
    made.graph.initializer.append(numpy_helper.from_array(np.array(True), "training"))
    made.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "ratio"))
    (end,) = [node for node in made.graph.node if "scores" in node.output]
    dropout = helper.make_node("Dropout", [end.input[0], "ratio", "training"], ["dropped"], name="drop")
    end.input[0] = "dropped"
    made.graph.node.insert(len(made.graph.node) - 1, dropout)
    onnx.save(made, file)
    with pytest.raises(ModelFileError, match=r"draws random numbers.*evaluation mode"):
        adopt(file, tmp_path / "out", announce=lambda _: None)


@pytest.mark.parametrize("meaning", ["padding", "added"])
def test_a_mask_that_means_something_else_is_refused_or_not_used(meaning: str, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    file = decoder(tmp_path / "model.onnx", past=False, positioned=False)
    made = onnx.load(file)
    nodes = made.graph.node
    (cast,) = [node for node in nodes if node.op_type == "Cast" and node.attribute[0].i == TensorProto.BOOL]
    if meaning == "padding":  # 1 where there is padding
        (reader,) = [node for node in nodes if cast.output[0] in node.input]
        reader.input[list(reader.input).index(cast.output[0])] = "inverted"
        nodes.insert(list(nodes).index(cast) + 1, helper.make_node("Not", [cast.output[0]], ["inverted"], name="not"))
    else:  # floats that are added to the scores
        (both,) = [node for node in nodes if cast.output[0] in node.input]
        (where,) = [node for node in nodes if both.output[0] in node.input]
        where.input[0] = next(name for name in both.input if name != cast.output[0])
        cast.attribute[0].i = TensorProto.FLOAT
        nodes.remove(both)
        for node in nodes:
            for place, name in enumerate(node.input):
                if name == where.output[0]:
                    node.input[place] = "both"
        nodes.insert(
            list(nodes).index(where) + 1,
            helper.make_node("Add", [where.output[0], cast.output[0]], ["both"], name="sum"),
        )
    onnx.save(made, file)
    if meaning == "padding":
        with pytest.raises(ModelFileError, match="no mask of 1 at real tokens"):
            adopt(file, tmp_path / "out", announce=lambda _: None)
        return
    report = adopt(file, tmp_path / "out", announce=lambda _: None)
    assert report.adopted.left_padding == "seen"
    model = HookedTransformer.from_onnx(tmp_path / "out", "cpu")
    np.testing.assert_allclose(model(IDS), forward(IDS)[0], **CLOSE)
    with pytest.raises(InputError, match="does not mask padding on the left"):
        model(IDS, attention_mask=PADDED)


def test_logits_of_the_last_token_alone_are_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    file = decoder(tmp_path / "model.onnx")
    made = onnx.load(file)
    for name, numbers in (("from", [-1]), ("to", [2**40]), ("along", [1])):
        made.graph.initializer.append(numpy_helper.from_array(np.array(numbers), name))
    (end,) = [node for node in made.graph.node if "scores" in node.output]
    last = helper.make_node("Slice", [end.input[0], "from", "to", "along"], ["last"], name="last token")
    end.input[0] = "last"
    made.graph.node.insert(len(made.graph.node) - 1, last)
    onnx.save(made, file)
    with pytest.raises(ModelFileError, match=r"logits of 1 of 11 tokens|not .* axes"):
        adopt(file, tmp_path / "out", announce=lambda _: None)


def test_a_hooked_file_is_not_adopted_again(report: AdoptReport, tmp_path: Path) -> None:
    assert report.folder is not None
    with pytest.raises(ModelFileError, match="hooked file already"):
        adopt(report.folder, tmp_path / "out", announce=lambda _: None)


def test_the_originals_own_folder_is_not_written_into(original: Path) -> None:
    with pytest.raises((InputError, ValueError), match=r"original|not empty"):
        adopt(original, original.parent, force=True, announce=lambda _: None)


def test_it_opens_in_one_step_from_the_cache(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path))
    first = HookedTransformer.from_onnx(original, "cpu", adopt=True)
    np.testing.assert_allclose(first(IDS), forward(IDS)[0], **CLOSE)
    (folder,) = (tmp_path / "hooked").iterdir()
    written = (folder / "model.onnx").stat().st_mtime_ns
    assert HookedTransformer.from_onnx(original, "cpu", adopt=True).cfg.n_ctx == first.cfg.n_ctx
    assert (folder / "model.onnx").stat().st_mtime_ns == written
    assert POSITIONS  # the longest input is the table's, once its weights are found
