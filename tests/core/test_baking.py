"""Edited files: what bake, drivable and strip write runs in plain ONNX Runtime and does what the edits do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import Phase, given, settings

import graphlens
from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer, bake_model, write_adapter, write_drivable
from graphlens.deploy import write_stripped
from graphlens.errors import ExportError, InputError, ModelFileError, UnknownHookPoint
from graphlens.interventions import Intervention, save
from tests.command_line import graphlens as command
from tests.intervention_specs import FLAG_SETS, baked, close, feeds_of, plain_session, python_hooks, runs, set_flags
from tests.models import MODEL

few = settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
SOURCE = graphlens.embedded_model()
CFG = MODEL.cfg
Z, RESID = "blocks.1.attn.hook_z", "blocks.2.hook_resid_post"
RNG = np.random.default_rng(11)
VECTOR = RNG.standard_normal(CFG.d_model).astype(np.float32)


@pytest.fixture(autouse=True)
def no_flags() -> Iterator[None]:
    yield
    set_flags(MODEL, ())


@pytest.mark.filterwarnings("ignore:two patches of the same elements")
@pytest.mark.parametrize("flags", FLAG_SETS, ids=str)
def test_a_baked_file_does_what_the_run_time_edits_do(
    flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    set_flags(MODEL, flags)

    @few
    @given(runs(MODEL, list(MODEL.hook_dict)))
    def check(run: tuple[np.ndarray, list[Intervention]]) -> None:
        tokens, items = run
        expected = MODEL.run_with_interventions(tokens, items)
        for with_past in (False, True):  # of the same edits: what opens a session is their run
            folder = baked(MODEL, items, tmp_path_factory.mktemp("baked") / "out", with_past=with_past)
            session = plain_session(folder)
            close(session.run(["logits"], feeds_of(session, tokens, CFG))[0], expected)

    check()


FOLDED: list[list[Intervention]] = [
    [Ablate(Z, heads=2)],
    [Ablate(Z, RNG.standard_normal((2, 32)), heads=[0, 3])],
    [Scale("blocks.1.attn.hook_q", 1.5, heads=1), Steer("blocks.1.attn.hook_k", RNG.standard_normal(32), heads=0)],
    [Steer("blocks.0.attn.hook_v", RNG.standard_normal((4, 32))), Ablate("blocks.0.attn.hook_v", heads=3)],
    [Patch("blocks.2.mlp.hook_pre", 0.3, dims=slice(10, 40)), Scale("blocks.2.mlp.hook_post", 0.5, dims=3)],
    [Scale("blocks.3.hook_attn_out", 0.2), Ablate("blocks.3.attn.hook_z", 1.0, heads=1)],
    [Ablate("blocks.0.hook_mlp_out"), Steer("blocks.1.hook_attn_out", VECTOR)],
    [Steer(RESID, VECTOR, 2.0), Steer("blocks.0.hook_resid_mid", VECTOR)],
    [Steer("blocks.3.hook_resid_pre", VECTOR)],
]
KEPT: list[list[Intervention]] = [  # each may not be folded, or not where it would come to stand
    [Steer(RESID, VECTOR), Scale("blocks.2.hook_mlp_out", 0.5), Ablate("blocks.2.hook_mlp_out", dims=[0, 1])],
    [Scale("blocks.1.hook_resid_post", 0.5), Steer("blocks.2.hook_resid_pre", VECTOR)],
    [Steer("blocks.0.hook_resid_pre", VECTOR)],
    [Ablate(Z, heads=1, positions=2)],
    [Steer(RESID, VECTOR, batch=0)],
    [Patch("blocks.1.attn.hook_result", VECTOR, heads=0), Steer(Z, 0.5), Scale("blocks.1.hook_attn_out", 2.0)],
    [Ablate("blocks.2.hook_attn_out", positions=-1), Steer("blocks.2.hook_resid_mid", VECTOR)],
]


def nodes_of(folder: Path) -> int:
    return len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


@pytest.fixture(scope="module")
def plain_nodes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many nodes the stripped model has."""
    return nodes_of(write_stripped(SOURCE, tmp_path_factory.mktemp("stripped") / "plain"))


@pytest.mark.parametrize("items", FOLDED, ids=str)
def test_an_edit_that_is_the_same_everywhere_costs_no_node(
    items: list[Intervention], plain_nodes: int, tokens: np.ndarray, tmp_path: Path
) -> None:
    folder = bake_model(SOURCE, items, tmp_path / "out")
    assert nodes_of(folder) == plain_nodes
    found = plain_session(folder).run(["logits"], {"input_ids": tokens})[0]
    close(found, MODEL.run_with_interventions(tokens, items))
    assert np.abs(found - MODEL(tokens)).max() > 1e-3


@pytest.mark.parametrize("items", KEPT, ids=str)
def test_an_edit_that_cannot_be_folded_is_not(
    items: list[Intervention], plain_nodes: int, tokens: np.ndarray, tmp_path: Path
) -> None:
    folder = bake_model(SOURCE, items, tmp_path / "out")
    assert nodes_of(folder) > plain_nodes
    if any("hook_result" in item.hook for item in items):
        set_flags(MODEL, ("use_attn_result",))
    found = plain_session(folder).run(["logits"], {"input_ids": tokens})[0]
    close(found, MODEL.run_with_interventions(tokens, items))


def test_a_baked_file_is_plain(tmp_path: Path) -> None:
    items = [Ablate(Z, heads=2), Steer(RESID, VECTOR, positions=[1, -1])]
    folder = bake_model(SOURCE, items, tmp_path / "out")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert model.ir_version <= 10
    assert {(opset.domain, opset.version <= 21) for opset in model.opset_import} == {("", True)}
    assert {node.domain for node in model.graph.node} == {""}
    assert [value.name for value in model.graph.output] == ["logits"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert "graphlens" not in metadata
    assert [record["kind"] for record in json.loads(metadata["graphlens.interventions"])["interventions"]] == [
        "ablate",
        "steer",
    ]
    assert not list(folder.rglob("*.partial"))
    for name, options in {"copied": {}, "apart": {"self_contained": True}, "linked": {"link": True}}.items():
        made = bake_model(SOURCE, items, tmp_path / name, **options)
        assert (made / "model.safetensors").samefile(SOURCE / "model.safetensors") is (name == "linked")
    with pytest.raises(InputError, match="choose one"):
        bake_model(SOURCE, items, tmp_path / "both", link=True, self_contained=True)
    past = bake_model(SOURCE, items, tmp_path / "past", with_past=True)
    names = [value.name for value in plain_session(past).get_outputs()]
    assert names == ["logits", *(f"present.{i}.{part}" for i in range(CFG.n_layers) for part in ("key", "value"))]


def test_a_baked_file_with_hooks_is_a_hooked_file(tokens: np.ndarray, tmp_path: Path) -> None:
    items = [Ablate(Z, heads=2), Steer(RESID, VECTOR, positions=1)]
    folder = bake_model(SOURCE, items, tmp_path / "out", keep_hooks=True)
    opened = HookedTransformer.from_onnx(folder, "cpu")
    logits, cache = opened.run_with_cache(tokens)
    expected, seen = MODEL.run_with_interventions(tokens, items, names_filter=lambda name: True)
    close(logits, expected)
    assert list(cache) == list(seen)
    for name in seen:
        np.testing.assert_allclose(cache[name], seen[name], rtol=1e-4, atol=1e-5)
    assert (cache[Z][:, :, 2] == 0).all()


@pytest.mark.parametrize(
    "items",
    [
        [Steer("blocks.1.hook_resid_post", 3 * VECTOR, positions="prompt")],
        [Steer("blocks.1.hook_resid_post", 3 * VECTOR, positions="generated")],
        [Steer("blocks.1.hook_resid_post", 3 * VECTOR, positions=[2, 7, 9]), Ablate(Z, heads=0)],
        [Scale(f"blocks.{i}.attn.hook_pattern", 0.0, dims=0) for i in range(4)],
    ],
    ids=str,
)
def test_generating_from_a_baked_file_is_generating_under_the_edits(items: list[Intervention], tmp_path: Path) -> None:
    tokens = np.random.default_rng(2).integers(1, CFG.d_vocab, (2, 6))
    with MODEL.intervene(items):
        expected = MODEL.generate(tokens, 10, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False)
    session = plain_session(bake_model(SOURCE, items, tmp_path / "out", with_past=True))
    feeds, all_tokens = feeds_of(session, tokens, CFG), tokens
    names = [value.name for value in session.get_outputs()]
    for _ in range(10):
        results = dict(zip(names, session.run(names, feeds), strict=True))
        new = results["logits"][:, -1:].argmax(-1)
        all_tokens = np.concatenate([all_tokens, new], 1)
        feeds = {
            name.replace("present", "past_key_values"): value for name, value in results.items() if name != "logits"
        }
        feeds |= {"input_ids": new, "attention_mask": np.ones_like(all_tokens)}
        feeds["position_ids"] = np.full_like(new, all_tokens.shape[1] - 1)
    np.testing.assert_array_equal(all_tokens, expected)
    assert not np.array_equal(
        expected, MODEL.generate(tokens, 10, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False)
    )


def test_positions_beyond_the_sequence_are_left_out_of_a_baked_run(tokens: np.ndarray, tmp_path: Path) -> None:
    values = RNG.standard_normal((2, CFG.d_model)).astype(np.float32)
    items = [Patch(RESID, values, positions=[2, 30]), Steer(RESID, RNG.standard_normal((9, CFG.d_model)))]
    session = plain_session(bake_model(SOURCE, items, tmp_path / "out"))
    expected = MODEL.run_with_interventions(
        tokens, [Patch(RESID, values[:1], positions=2), Steer(RESID, items[1].array[: tokens.shape[1]])]
    )
    close(session.run(["logits"], {"input_ids": tokens})[0], expected)


# Drivable files


@pytest.fixture(scope="module")
def drivable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drivable") / "out"
    hooks = ["blocks.*.attn.hook_z", RESID, "blocks.*.attn.hook_attn_scores", "blocks.1.attn.hook_result"]
    names = write_drivable(SOURCE, hooks, folder)
    assert len(names) == 2 * CFG.n_layers + 2
    return folder


def test_a_drivable_file_is_driven_through_its_inputs(drivable: Path, tokens: np.ndarray) -> None:
    session = plain_session(drivable)
    feeds = {"input_ids": tokens}
    close(session.run(None, feeds)[0], MODEL(tokens))
    heads = np.ones((1, 1, CFG.n_heads, 1), np.float32)
    heads[:, :, 2] = 0
    scaled = session.run(["logits"], {**feeds, f"{Z}/scale": heads})[0]
    close(scaled, MODEL.run_with_interventions(tokens, Ablate(Z, heads=2)))
    added = session.run(["logits"], {**feeds, f"{RESID}/add": VECTOR[None, None]})[0]
    close(added, MODEL.run_with_interventions(tokens, Steer(RESID, VECTOR)))
    chosen = np.zeros((1, tokens.shape[1], 1), bool)
    chosen[:, 3] = True
    patched = session.run(["logits"], {**feeds, f"{RESID}/where": chosen, f"{RESID}/patch": VECTOR[None, None]})[0]
    close(patched, MODEL.run_with_interventions(tokens, Patch(RESID, VECTOR, positions=3)))
    scores = "blocks.1.attn.hook_attn_scores"
    flat = session.run(["logits"], {**feeds, f"{scores}/scale": np.zeros((1, 1, 1, 1), np.float32)})[0]
    close(flat, MODEL.run_with_interventions(tokens, Scale(scores, 0.0)))


def test_gates_say_what_they_are(drivable: Path) -> None:
    metadata = plain_session(drivable).get_modelmeta().custom_metadata_map
    gates = json.loads(metadata["graphlens.gates"])
    assert gates[Z] == {"kinds": ["scale", "add", "patch"], "axes": ["batch", "pos", "head_index", "d_head"]}
    optional = {value.name for value in plain_session(drivable).get_overridable_initializers()}
    assert {f"{hook}/{part}" for hook in gates for part in ("scale", "add", "where", "patch")} <= optional


def test_required_gates_are_inputs_without_defaults(tokens: np.ndarray, tmp_path: Path) -> None:
    write_drivable(SOURCE, Z, tmp_path / "out", kinds=["scale"], required=True, with_past=True)
    session = plain_session(tmp_path / "out")
    assert f"{Z}/scale" in [value.name for value in session.get_inputs()]
    one = np.ones((1, 1, 1, 1), np.float32)
    close(session.run(["logits"], {**feeds_of(session, tokens, CFG), f"{Z}/scale": one})[0], MODEL(tokens), 1e-6)


def test_strip_gives_back_the_original_graph(drivable: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    original = write_stripped(SOURCE, tmp_path / "original")
    plain_gates = tmp_path / "gates"
    write_drivable(SOURCE, ["blocks.*.hook_resid_*", "*scores", "unembed.hook_out", "hook_embed"], plain_gates)
    assert (write_stripped(plain_gates, tmp_path / "stripped") / "model.onnx").read_bytes() == (
        original / "model.onnx"
    ).read_bytes()
    again = write_stripped(drivable, tmp_path / "again")  # this one has a flagged hook point's rewrite in it
    close(plain_session(again).run(None, {"input_ids": tokens})[0], MODEL(tokens))
    assert [value.name for value in plain_session(again).get_outputs()] == ["logits"]


@pytest.mark.parametrize("required", [False, True])
def test_strip_takes_gates_out_of_a_hooked_file_too(required: bool, tmp_path: Path) -> None:
    write_drivable(SOURCE, "*", tmp_path / "driven", required=required, keep_hooks=True)
    found = write_stripped(tmp_path / "driven", tmp_path / "stripped")
    original = write_stripped(SOURCE, tmp_path / "original")
    assert (found / "model.onnx").read_bytes() == (original / "model.onnx").read_bytes()


def test_a_steering_vector_as_an_adapter_file(drivable: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    items = [Steer(RESID, VECTOR, 2.0), Ablate(Z, 0.5, heads=1)]
    assert write_adapter(SOURCE, items, tmp_path / "steer.onnx_adapter") == [f"{RESID}/add", f"{Z}/scale", f"{Z}/add"]
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(tmp_path / "steer.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    found = plain_session(drivable).run(None, {"input_ids": tokens}, options)[0]
    close(found, MODEL.run_with_interventions(tokens, items))
    with pytest.raises(InputError, match="the same at every position"):
        write_adapter(SOURCE, Steer(RESID, VECTOR, positions=1), tmp_path / "x.onnx_adapter")


def test_an_adapter_in_the_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_adapter(SOURCE, Steer(RESID, VECTOR), "~/steer.onnx_adapter")
    assert (tmp_path / "steer.onnx_adapter").is_file()


@pytest.mark.parametrize("text", ["no JSON", "[1]", "[" * 100_000])
def test_settings_that_cannot_be_read_are_said(text: str, tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / "config.json").write_text(text)
    for options in ({"layout": "transformersjs"}, {"with_past": True}):
        with pytest.raises(ModelFileError, match=r"config\.json (cannot be read|holds no JSON object)"):
            bake_model(tiny_copy, [], tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_an_adapter_for_attention_scores(drivable: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    scores, file = "blocks.1.attn.hook_attn_scores", tmp_path / "scores.onnx_adapter"
    items = [Scale(scores, 0.5, heads=[0, 2]), Ablate(scores, 0.25, heads=1)]
    assert write_adapter(SOURCE, items, file) == [f"{scores}/scale", f"{scores}/add"]
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    found = plain_session(drivable).run(None, {"input_ids": tokens}, options)[0]
    close(found, MODEL.run_with_interventions(tokens, items))
    assert np.abs(found - MODEL(tokens)).max() > 1e-3
    # Its dims are keys, of which there are more or fewer in every run.
    with pytest.raises(InputError, match="the same at every position"):
        write_adapter(SOURCE, Scale(scores, 0.5, dims=0), file)


@pytest.mark.parametrize("shape", [(4, 4), (4, 1), (1, 4), (2, 7)], ids=str)
def test_an_adapter_where_prompts_positions_and_heads_are_as_many(
    shape: tuple[int, int], drivable: Path, tmp_path: Path
) -> None:
    """There are 4 heads: an operand of 4 rows is one row for each head, and for nothing else."""
    ids = RNG.integers(0, CFG.d_vocab, shape)
    draw = np.random.default_rng(shape)
    per_head = draw.standard_normal((4, 1, 1)).astype(np.float32)
    for name, item in {
        "all": Scale("blocks.1.attn.hook_attn_scores", per_head),
        "two": Scale("blocks.1.attn.hook_attn_scores", per_head[:2], heads=[3, 1]),
        "vectors": Steer(Z, draw.standard_normal((4, CFG.d_head))),
    }.items():
        write_adapter(SOURCE, item, tmp_path / name)
        adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        adapter.Load(str(tmp_path / name))
        options.add_active_adapter(adapter)
        found = plain_session(drivable).run(None, {"input_ids": ids}, options)[0]
        close(found, MODEL.run_with_hooks(ids, fwd_hooks=python_hooks(MODEL, [item])))


def test_the_transformersjs_layout_holds_its_weights(tokens: np.ndarray, tmp_path: Path) -> None:
    items: Sequence[Intervention] = [Ablate(Z, heads=2)]
    folder = bake_model(SOURCE, items, tmp_path / "out", with_past=True, layout="transformersjs")
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx"]
    assert not list(folder.glob("*.safetensors"))
    session = plain_session(folder / "onnx")
    close(session.run(["logits"], feeds_of(session, tokens, CFG))[0], MODEL.run_with_interventions(tokens, items))
    assert json.loads((folder / "config.json").read_text())["transformers.js_config"] == {"dtype": "fp32"}


def test_large_weights_lie_beside_the_transformersjs_graph(
    tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphlens.pipelines.runtimes.EMBEDDABLE", 1_000_000)
    folder = bake_model(SOURCE, [], tmp_path / "out", with_past=True, layout="transformersjs")
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    settings_ = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert settings_ == {"dtype": "fp32", "use_external_data_format": True}
    session = plain_session(folder / "onnx")
    close(session.run(["logits"], feeds_of(session, tokens, CFG))[0], MODEL(tokens), 1e-6)


def test_what_genai_reads(tmp_path: Path) -> None:
    config = json.loads((bake_model(SOURCE, [], tmp_path / "out", with_past=True) / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["head_size"], config["model"]["vocab_size"]) == (
        CFG.n_layers,
        CFG.d_head,
        CFG.d_vocab,
    )
    assert decoder["inputs"]["past_key_names"] % 0 == "past_key_values.0.key"
    assert decoder["outputs"]["present_value_names"] % 3 == "present.3.value"


# Bad input


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    for write in (
        lambda: bake_model(SOURCE, [], tmp_path),
        lambda: write_drivable(SOURCE, Z, tmp_path),
        lambda: write_stripped(SOURCE, tmp_path),
    ):
        with pytest.raises(ExportError, match="not empty"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_bake_leaves_nothing(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("graphlens.surgery.files.write_graph", stop)
    with pytest.raises((KeyboardInterrupt, ExportError)):
        bake_model(SOURCE, [Ablate(Z, heads=1)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_edits_that_a_file_cannot_hold(tmp_path: Path) -> None:
    for items, says in (
        ([Steer(RESID, VECTOR, positions="generated")], "needs a file with past keys and values"),
        ([Ablate(Z, heads=4)], "there is no 4"),
        ([Steer(RESID, np.zeros(768))], "768"),
        ([Patch(RESID, np.zeros((2, 128)), positions=[0, -1])], "counted from the same end"),
        ([Patch(RESID, np.zeros((3, 128)), positions=slice(2, None))], "depends on the length"),
    ):
        with pytest.raises(InputError, match=says):
            bake_model(SOURCE, items, tmp_path / "out")
    with pytest.raises(UnknownHookPoint, match="hook_z"):
        bake_model(SOURCE, [Ablate("blocks.1.attn.hook_zz")], tmp_path / "out")
    with pytest.raises(UnknownHookPoint, match="no hook point"):
        write_drivable(SOURCE, "blocks.9.*", tmp_path / "out")
    with pytest.raises(InputError, match="scale, add, patch"):
        write_drivable(SOURCE, Z, tmp_path / "out", kinds=["multiply"])
    with pytest.raises(InputError, match="fires for queries, keys and values apart"):
        write_drivable(SOURCE, ["blocks.1.hook_q_input", "blocks.1.ln1.hook_scale"], tmp_path / "out")
    with pytest.raises(InputError, match="layout 'flat'"):
        bake_model(SOURCE, [], tmp_path / "out", layout="flat")
    with pytest.raises(InputError, match="without hooks"):
        bake_model(SOURCE, [], tmp_path / "out", layout="transformersjs", keep_hooks=True)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_bakes_drives_and_strips(tmp_path: Path, tokens: np.ndarray) -> None:
    items = [Ablate(Z, heads=2), Steer(RESID, VECTOR, positions=1)]
    edits = save(items, tmp_path / "edits.json")
    done = command("bake", SOURCE, edits, "-o", tmp_path / "baked")
    assert done.returncode == 0, done.stderr
    found = plain_session(tmp_path / "baked").run(None, {"input_ids": tokens})[0]
    close(found, MODEL.run_with_interventions(tokens, items))
    assert command("bake", SOURCE, edits, "-o", tmp_path / "baked").returncode == 1
    done = command("drivable", SOURCE, "--gates", "blocks.*.attn.hook_z", "-o", tmp_path / "driven")
    assert "4 gates" in done.stdout
    assert command("strip", tmp_path / "driven", "-o", tmp_path / "plain").returncode == 0
    close(plain_session(tmp_path / "plain").run(None, {"input_ids": tokens})[0], MODEL(tokens), 1e-6)
    done = command("export", SOURCE, "-o", tmp_path / "past", "--with-past", "--layout", "transformersjs")
    assert done.returncode == 0, done.stderr
    session = plain_session(tmp_path / "past" / "onnx")
    close(session.run(["logits"], feeds_of(session, tokens, CFG))[0], MODEL(tokens), 1e-6)
    done = command("export", SOURCE, "-o", tmp_path / "other", "--with-past", "--force")
    assert (done.returncode, (tmp_path / "other").exists()) == (1, False)
    assert "hooked export" in done.stderr
    save(Ablate("blocks.1.attn.hook_zz"), edits)
    done = command("bake", SOURCE, edits, "-o", tmp_path / "other")
    assert done.returncode == 1
    assert "Nearest" in done.stderr
    assert not (tmp_path / "other").exists()
