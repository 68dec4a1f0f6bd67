"""Surgery: what it changes, what it leaves as it was, and how a hooked folder is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphlens import HookedTransformer, surgery
from graphlens.errors import ModelFileError, UnknownHookPoint
from graphlens.file.manifest import Manifest
from graphlens.file.safetensors import SafetensorsFile
from graphlens.runtime import open_session
from graphlens.surgery.fingerprint import fingerprint

POST, PRE = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
END = "unembed.hook_in"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def shared(tiny_folder: Path) -> ir.Model:
    """The embedded model's graph; every test leaves it as it was."""
    return surgery.load(tiny_folder)


@pytest.fixture
def model(shared: ir.Model) -> Iterator[ir.Model]:
    """The embedded model's graph, compared with itself after the test: surgery never changes its input."""
    before = serialised(shared)
    yield shared
    assert serialised(shared) == before


@pytest.fixture(scope="session")
def full(tiny: HookedTransformer, tokens: np.ndarray) -> Mapping[str, np.ndarray]:
    """Every activation of the unedited model, and its logits."""
    logits, cache = tiny.run_with_cache(tokens)
    return {**cache, "logits": logits}


def serialised(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def run(model: ir.Model, folder: Path, tokens: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Runs a graph in memory with the weights of a folder: hook name (or logits) -> value."""
    hooks = surgery.read_manifest(model).hooks
    values = {name: hooks[name].value if name in hooks else name for name in names}
    outputs = list(dict.fromkeys(values.values()))
    arrays = open_session(serialised(model), "cpu", folder).run(outputs, {"input_ids": tokens})
    found = dict(zip(outputs, arrays, strict=True))
    return {name: found[value] for name, value in values.items()}


def identity(value: ir.Value, scope: surgery.splice.Scope) -> ir.Value:
    return scope.op("Identity", [value])


def plus(amount: float, label: str = "amount") -> Any:
    return lambda value, scope: scope.op("Add", [value, scope.constant(np.float32(amount), label)])


def times(amount: float, label: str = "amount") -> Any:
    return lambda value, scope: scope.op("Mul", [value, scope.constant(np.float32(amount), label)])


def half(activation: np.ndarray, hook: Any) -> np.ndarray:
    return activation * np.float32(0.5)


def noise(shape: Sequence[int]) -> np.ndarray:
    """Different at every element: softmax and LayerNorm absorb a constant, LayerNorm a factor too."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


# Splicing


def test_identities_at_every_hook_point_change_nothing(
    model: ir.Model, full: Mapping[str, np.ndarray], tiny_folder: Path, tokens: np.ndarray
) -> None:
    names = list(surgery.read_manifest(model).hooks)
    spliced = surgery.splice(model, dict.fromkeys(names, identity))
    assert len(spliced.graph) == len(model.graph) + len(names)
    found = run(spliced, tiny_folder, tokens, [*names, "logits"])
    for name, value in found.items():
        np.testing.assert_array_equal(value, full[name], name)


@pytest.mark.parametrize(
    "name",
    ["hook_embed", POST, PRE, "blocks.2.attn.hook_attn_scores", "blocks.3.ln2.hook_scale", "unembed.hook_out"],
)
def test_an_identity_at_one_hook_point_changes_nothing(
    name: str, model: ir.Model, full: Mapping[str, np.ndarray], tiny_folder: Path, tokens: np.ndarray
) -> None:
    spliced = surgery.splice(model, {name: identity})
    assert len(spliced.graph) == len(model.graph) + 1
    for other, value in run(spliced, tiny_folder, tokens, list(full)).items():
        np.testing.assert_array_equal(value, full[other], other)


@pytest.mark.parametrize(
    "name",
    ["hook_pos_embed", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_k", "blocks.2.mlp.hook_post", "unembed.hook_out"],
)
def test_a_spliced_edit_is_the_python_hook_that_does_the_same(
    name: str,
    model: ir.Model,
    tiny: HookedTransformer,
    full: Mapping[str, np.ndarray],
    tiny_folder: Path,
    tokens: np.ndarray,
) -> None:
    change = noise(full[name].shape)
    spliced = surgery.splice(model, {name: lambda x, scope: scope.op("Add", [x, scope.constant(change, "change")])})
    names = list(tiny.hook_dict)
    with tiny.hooks([(name, lambda x, hook: x + change)]):
        logits, cache = tiny.run_with_cache(tokens)
    found = run(spliced, tiny_folder, tokens, [*names, "logits"])
    for other in names:
        masked = np.isneginf(cache[other])
        np.testing.assert_array_equal(np.isneginf(found[other]), masked)
        assert_near(np.where(masked, 0, found[other]), np.where(masked, 0, cache[other]))
    assert_near(found["logits"], logits)
    assert not np.allclose(logits, full["logits"], atol=1e-3)


ORDERS: dict[str, Callable[[ir.Model], ir.Model]] = {
    "at once": lambda m: surgery.splice(m, {POST: plus(1), PRE: times(3)}),
    "at once, listed backwards": lambda m: surgery.splice(m, {PRE: times(3), POST: plus(1)}),
    "one by one": lambda m: surgery.splice(surgery.splice(m, {POST: plus(1)}), {PRE: times(3)}),
    "one by one, backwards": lambda m: surgery.splice(surgery.splice(m, {PRE: times(3)}), {POST: plus(1)}),
}


@pytest.mark.parametrize("order", ORDERS)
def test_edits_at_two_names_of_one_value_apply_in_firing_order_whatever_order_they_came_in(
    order: str,
    model: ir.Model,
    tiny: HookedTransformer,
    full: Mapping[str, np.ndarray],
    tiny_folder: Path,
    tokens: np.ndarray,
) -> None:
    found = run(ORDERS[order](model), tiny_folder, tokens, [POST, PRE, "logits"])
    np.testing.assert_array_equal(found[POST], full[POST] + np.float32(1))
    np.testing.assert_array_equal(found[PRE], (full[POST] + np.float32(1)) * np.float32(3))
    hooks = [(PRE, lambda x, hook: x * np.float32(3)), (POST, lambda x, hook: x + np.float32(1))]
    assert_near(found["logits"], tiny.run_with_hooks(tokens, fwd_hooks=hooks))


def test_an_edit_at_the_later_of_two_names_leaves_the_earlier_ones_value(
    model: ir.Model, full: Mapping[str, np.ndarray], tiny_folder: Path, tokens: np.ndarray
) -> None:
    names = [POST, PRE, "blocks.0.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid"]
    change = noise(full[PRE].shape)
    spliced = surgery.splice(model, {PRE: lambda x, scope: scope.op("Add", [x, scope.constant(change, "change")])})
    found = run(spliced, tiny_folder, tokens, names)
    np.testing.assert_array_equal(found[POST], full[POST])
    np.testing.assert_array_equal(found[PRE], full[POST] + change)
    np.testing.assert_array_equal(found["blocks.0.hook_mlp_out"], full["blocks.0.hook_mlp_out"])
    # Both readers of the residual see the edit: the attention, and the sum after it.
    assert not np.allclose(found["blocks.1.hook_attn_out"], full["blocks.1.hook_attn_out"], atol=1e-3)
    np.testing.assert_array_equal(found["blocks.1.hook_resid_mid"], found[PRE] + found["blocks.1.hook_attn_out"])


def test_an_edit_at_the_earlier_of_two_names_is_seen_by_both(
    model: ir.Model, full: Mapping[str, np.ndarray], tiny_folder: Path, tokens: np.ndarray
) -> None:
    found = run(surgery.splice(model, {POST: times(3)}), tiny_folder, tokens, [POST, PRE])
    for value in found.values():
        np.testing.assert_array_equal(value, full[POST] * np.float32(3))


@pytest.mark.parametrize("name", [POST, PRE, "blocks.2.hook_mlp_out"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (plus(1), times(3), lambda x: (x + np.float32(1)) * np.float32(3)),
        (times(3), plus(1), lambda x: x * np.float32(3) + np.float32(1)),
        (plus(1), plus(2), lambda x: x + np.float32(1) + np.float32(2)),
    ],
)
def test_a_second_splice_at_a_hook_point_edits_what_the_first_left(
    name: str,
    first: Any,
    second: Any,
    expected: Callable[[np.ndarray], np.ndarray],
    model: ir.Model,
    full: Mapping[str, np.ndarray],
    tiny_folder: Path,
    tokens: np.ndarray,
) -> None:
    twice = surgery.splice(surgery.splice(model, {name: first}), {name: second})
    np.testing.assert_array_equal(run(twice, tiny_folder, tokens, [name])[name], expected(full[name]))


def test_an_edit_that_returns_its_input_changes_nothing(
    model: ir.Model, full: Mapping[str, np.ndarray], tiny_folder: Path, tokens: np.ndarray
) -> None:
    spliced = surgery.splice(model, dict.fromkeys([POST, PRE, "blocks.1.attn.hook_z"], lambda value, scope: value))
    for name, value in run(spliced, tiny_folder, tokens, list(full)).items():
        np.testing.assert_array_equal(value, full[name], name)


@pytest.mark.parametrize("name", [POST, PRE, "blocks.1.attn.hook_pattern"])
@pytest.mark.parametrize("kind", ["constant", "input"])
def test_an_edit_may_return_a_constant_or_an_input(
    kind: str,
    name: str,
    model: ir.Model,
    tiny: HookedTransformer,
    full: Mapping[str, np.ndarray],
    tiny_folder: Path,
    tokens: np.ndarray,
) -> None:
    value = noise(full[name].shape)
    edits = {
        "constant": lambda x, scope: scope.constant(value, "value"),
        "input": lambda x, scope: scope.input("value", value, list(value.shape)),
    }
    spliced = surgery.splice(model, {name: edits[kind]})
    inputs = {str(given.name) for given in model.graph.inputs}
    assert {str(given.name) for given in spliced.graph.inputs} == inputs | ({"value"} if kind == "input" else set())
    found = run(spliced, tiny_folder, tokens, [name, "logits"])
    np.testing.assert_array_equal(found[name], value)
    assert_near(found["logits"], tiny.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: value)]))


def test_an_edit_of_the_last_hook_point_is_an_edit_of_the_logits(
    model: ir.Model, full: Mapping[str, np.ndarray], tiny_folder: Path, tokens: np.ndarray
) -> None:
    found = run(surgery.splice(model, {"unembed.hook_out": plus(1)}), tiny_folder, tokens, ["logits"])
    np.testing.assert_array_equal(found["logits"], full["logits"] + np.float32(1))


def test_an_edit_that_fails_leaves_the_model_as_it_was(model: ir.Model) -> None:
    def fail(value: ir.Value, scope: Any) -> ir.Value:
        scope.input("added", np.asarray(False), [])
        scope.op("Neg", [value])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        surgery.splice(model, {POST: identity, PRE: fail})


def test_unknown_names_are_refused_before_any_edit_is_asked_for(model: ir.Model) -> None:
    def never(value: ir.Value, scope: Any) -> ir.Value:
        pytest.fail("an edit was called")

    with pytest.raises(UnknownHookPoint, match=r"'blocks\.4\.hook_resid_pre'.*4 layers"):
        surgery.splice(model, {POST: never, "blocks.4.hook_resid_pre": never})
    for function in (surgery.expose, surgery.prune, surgery.with_python_gates):
        with pytest.raises(UnknownHookPoint, match=r"Nearest: 'blocks\.0\.hook_resid_post'"):
            function(model, [PRE, "blocks.0.hook_resid_pots"])


# Outputs


TRIMMED: dict[str, Callable[[ir.Model], ir.Model]] = {
    "strip": surgery.strip,
    "expose nothing": lambda m: surgery.expose(m, []),
    "expose": lambda m: surgery.expose(m, ["blocks.1.attn.hook_pattern", POST, PRE]),
    "expose all": lambda m: surgery.expose(m, surgery.read_manifest(m).hooks),
    "prune": lambda m: surgery.prune(m, ["logits"]),
    "prune by its hook name": lambda m: surgery.prune(m, ["unembed.hook_out"]),
    "strip, then expose all": lambda m: surgery.expose(surgery.strip(m), surgery.read_manifest(m).hooks),
}


@pytest.mark.parametrize("how", TRIMMED)
def test_choosing_outputs_leaves_the_logits(
    how: str, model: ir.Model, full: Mapping[str, np.ndarray], tiny_folder: Path, tokens: np.ndarray
) -> None:
    trimmed = TRIMMED[how](model)
    assert_near(run(trimmed, tiny_folder, tokens, ["logits"])["logits"], full["logits"])


def test_the_outputs_are_those_asked_for(model: ir.Model) -> None:
    def outputs(model: ir.Model) -> list[str]:
        return [str(value.name) for value in model.graph.outputs]

    hooks = surgery.read_manifest(model).hooks
    assert outputs(surgery.strip(model)) == ["logits"]
    pattern, z = "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z"
    assert outputs(surgery.expose(model, [z, pattern])) == ["logits", hooks[pattern].value, hooks[z].value]
    assert outputs(surgery.expose(model, [PRE, POST])) == ["logits", hooks[POST].value]
    assert outputs(surgery.prune(model, [pattern])) == [hooks[pattern].value]
    distinct = {entry.value for entry in hooks.values()} | {"logits"}
    assert set(outputs(surgery.expose(model, hooks))) == distinct
    assert len(outputs(surgery.expose(model, hooks))) == len(distinct)


def test_stripping_and_exposing_keep_every_hook_point(model: ir.Model) -> None:
    for changed in (surgery.strip(model), surgery.expose(model, [POST])):
        assert surgery.read_manifest(changed) == surgery.read_manifest(model)
        surgery.ensure_hooks_resolve(changed)


def test_a_pruned_graph_holds_only_what_its_outputs_need(model: ir.Model) -> None:
    pruned = surgery.prune(model, ["blocks.1.hook_resid_post"])
    assert len(pruned.graph) < len(model.graph) * 0.6
    needed, waiting = set(), list(pruned.graph.outputs)
    while waiting:
        value = waiting.pop()
        if value is not None and value not in needed:
            needed.add(value)
            waiting += value.producer().inputs if value.producer() else []
    assert {output for node in pruned.graph for output in node.outputs} <= needed
    assert set(pruned.graph.initializers.values()) <= needed
    kept = list(surgery.read_manifest(pruned).hooks)
    assert kept == [name for name in surgery.read_manifest(model).hooks if name in kept]
    assert "blocks.1.hook_resid_post" in kept
    assert not [name for name in kept if name.startswith(("blocks.2.attn", "blocks.3", "ln_final", "unembed"))]


def test_pruning_to_the_embedding_leaves_the_token_ids_and_one_weight(model: ir.Model) -> None:
    pruned = surgery.prune(model, ["hook_embed"])
    assert [str(value.name) for value in pruned.graph.inputs] == ["input_ids"]
    (weight,) = pruned.graph.initializers.values()
    assert isinstance(weight.const_value, ir.ExternalTensor)
    assert len(pruned.graph) < 5


def test_a_pruned_graph_gives_the_full_runs_value_without_the_later_weights(
    model: ir.Model, full: Mapping[str, np.ndarray], tiny_copy: Path, tokens: np.ndarray
) -> None:
    file = SafetensorsFile(tiny_copy / WEIGHTS)
    data = np.fromfile(tiny_copy / WEIGHTS, np.uint8)
    later = [name for name in file.entries if "h.2." in name or "h.3." in name or "ln_f" in name]
    assert len(later) == 2 * 12 + 2
    for name in later:
        entry = file.entries[name]
        data[entry.offset : entry.offset + entry.length].view(np.float32)[:] = np.nan
    (tiny_copy / WEIGHTS).write_bytes(data.tobytes())
    pruned = surgery.prune(model, ["blocks.1.hook_resid_post"])
    found = run(pruned, tiny_copy, tokens, ["blocks.1.hook_resid_post"])
    np.testing.assert_array_equal(found["blocks.1.hook_resid_post"], full["blocks.1.hook_resid_post"])
    assert np.isnan(run(model, tiny_copy, tokens, ["logits"])["logits"]).all()


def test_an_edit_survives_pruning_and_pruning_an_edit(
    model: ir.Model, full: Mapping[str, np.ndarray], tiny_folder: Path, tokens: np.ndarray
) -> None:
    name = "blocks.2.hook_resid_pre"
    for changed in (
        surgery.prune(surgery.splice(model, {name: plus(1)}), [name]),
        surgery.splice(surgery.prune(model, [name]), {name: plus(1)}),
    ):
        np.testing.assert_array_equal(
            run(changed, tiny_folder, tokens, [name])[name], full["blocks.1.hook_resid_post"] + np.float32(1)
        )


@pytest.mark.parametrize("name", ["hook_embed", POST, PRE, "blocks.3.attn.hook_k", "ln_final.hook_scale", END])
def test_a_gate_works_alike_before_and_after_what_is_left_out(
    name: str, model: ir.Model, tiny: HookedTransformer, tiny_folder: Path, tokens: np.ndarray
) -> None:
    """Graphs are made fewer outputs first, gates last: what is shared by all kinds of gates is made once."""
    gate, rank = {name: ("scale",)}, len(surgery.read_manifest(model).hooks[name].axes)
    feeds = {"input_ids": tokens, f"{name}/scale": np.full((1,) * rank, 0.5, np.float32)}
    orders = {
        "logits": (
            surgery.with_gates(surgery.keep_results(model), gate),
            surgery.keep_results(surgery.with_gates(model, gate)),
        ),
        END: (
            surgery.with_gates(surgery.without_logits(surgery.keep_results(model)), gate),
            surgery.without_logits(surgery.with_gates(model, gate)),
        ),
    }
    with tiny.hooks([(name, half)]):
        logits, cache = tiny.run_with_cache(tokens, names_filter=END)
    for result, graphs in orders.items():
        for graph in graphs:
            hooks = surgery.read_manifest(graph).hooks
            assert ("unembed.hook_out" in hooks) == (result == "logits")
            value = hooks[result].value if result in hooks else result
            (found,) = open_session(serialised(graph), "cpu", tiny_folder).run([value], feeds)
            assert_near(found, logits if result == "logits" else cache[END])
    bare = orders["logits"][0]
    assert [value.name for value in bare.graph.outputs] == ["logits"]


def test_a_pass_that_loses_a_hook_point_is_caught(model: ir.Model) -> None:
    broken = model.clone()
    next(v for node in broken.graph for v in node.outputs if v.name == POST).name = "renamed"
    with pytest.raises(ModelFileError, match=rf"lost .*'{POST}'"):
        surgery.ensure_hooks_resolve(broken)


def test_gates_that_stay_off_change_nothing(
    model: ir.Model, full: Mapping[str, np.ndarray], tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    gated = surgery.with_python_gates(model, [POST, "blocks.1.attn.hook_z"])
    assert sum(node.op_type == "If" for node in gated.graph) == 2
    assert {"python/run", f"python/{POST}"} <= {value.name for value in gated.graph.inputs}
    logits = tiny.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_out", lambda x, hook: None)])
    np.testing.assert_array_equal(logits, full["logits"])


# The file


@pytest.mark.parametrize("required", [False, True])
def test_gates_that_are_taken_out_leave_the_graph_that_was(model: ir.Model, required: bool) -> None:
    flagged = surgery.with_flagged(model, ["use_hook_tokens", "use_split_qkv_input"])
    kinds = {
        name: ["patch"] if entry.dtype.startswith("int") else ["scale", "add", "patch"]
        for name, entry in surgery.read_manifest(flagged).hooks.items()
    }
    before = serialised(flagged)
    some = ("hook_tokens", "blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.attn.hook_attn_scores")
    for names in (*([name] for name in some), some[1:3], kinds):
        gated = surgery.with_gates(flagged, {name: kinds[name] for name in names}, required)
        assert serialised(surgery.without_gates(gated)) == before, names


def test_the_file_is_standard_onnx(tiny_copy: Path) -> None:
    proto = onnx.load(tiny_copy / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version <= 21) for entry in proto.opset_import] == [("", True)]
    assert proto.ir_version <= 10
    assert not proto.functions
    graphs, nodes = [proto.graph], []
    while graphs:
        graph = graphs.pop()
        nodes += graph.node
        graphs += [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    assert {node.domain for node in nodes} == {""}
    for node in nodes:
        assert onnx.defs.has(node.op_type), node.op_type
        assert onnx.defs.get_schema(node.op_type, proto.opset_import[0].version).since_version <= 21
    # A copy: onnx (not ONNX Runtime) refuses external data that has a second hard link.
    onnx.checker.check_model(str(tiny_copy / "model.onnx"), full_check=True)


def test_the_file_holds_no_weights_and_no_name_of_this_machine(tiny_folder: Path) -> None:
    data = (tiny_folder / "model.onnx").read_bytes()
    assert len(data) < 0.05 * (tiny_folder / WEIGHTS).stat().st_size
    for text in (b"site-packages", b"/home/", b"/tmp/", b"/root/", b"Traceback"):
        assert text not in data


def strings(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        yield from strings(list(data.items()))
    elif isinstance(data, Sequence):
        for entry in data:
            yield from strings(entry)


def test_the_manifest_survives_json_and_holds_no_absolute_path(model: ir.Model) -> None:
    manifest = surgery.read_manifest(model)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json()).to_json() == manifest.to_json()
    found = list(strings(json.loads(manifest.to_json())))
    assert "embed.W_E" in found
    for text in found:
        assert not PurePosixPath(text).is_absolute()
        assert not PureWindowsPath(text).anchor
        assert ".." not in PurePosixPath(text).parts
    changed = replace(manifest, revision="abc", processing=("fold_ln",), exporter={"a": "1"})
    assert Manifest.from_json(changed.to_json()) == changed != manifest


def test_the_manifests_fingerprint_is_the_weights_files(model: ir.Model, tiny_folder: Path) -> None:
    files = surgery.read_manifest(model).files
    assert files == {path.name: fingerprint(path) for path in tiny_folder.glob("*.safetensors")}


@pytest.mark.parametrize("byte", [0, 7, -1])
def test_the_fingerprint_sees_every_byte_of_every_tensor(byte: int, tiny_copy: Path) -> None:
    path = tiny_copy / WEIGHTS
    original = fingerprint(path)
    entries = SafetensorsFile(path).entries
    assert len(entries) > 48
    seen = set()
    with path.open("r+b") as file:
        for name, entry in list(entries.items())[::5]:
            place = entry.offset + byte % entry.length
            file.seek(place)
            (old,) = file.read(1)
            file.seek(place)
            file.write(bytes([old ^ 0x40]))
            file.flush()
            found = fingerprint(path)
            assert found.sha256 != original.sha256, name
            assert found.size == original.size
            seen.add(found.sha256)
            file.seek(place)
            file.write(bytes([old]))
            file.flush()
    assert len(seen) == len(list(entries)[::5])
    assert fingerprint(path) == original
