"""Adopting where sizes tell nothing apart, where the original changes later, and where somebody stops it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import tests.foreign_decoder as made
from graphlens import HookedTransformer, adopt
from graphlens.errors import ModelFileError

CLOSE = {"rtol": 0, "atol": 2e-5}  # float32 beside float64; numbers of about 10


def test_sizes_that_all_coincide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks, heads, numbers of a head, prompts and tokens: 4. As wide an MLP, vocabulary and table of positions: 16."""
    for name, size in {
        "LAYERS": 4,
        "HEADS": 4,
        "D_HEAD": 4,
        "D_MODEL": 16,
        "D_MLP": 16,
        "VOCAB": 16,
        "POSITIONS": 16,
    }.items():
        monkeypatch.setattr(made, name, size)
    report = adopt(made.decoder(tmp_path / "model.onnx"), tmp_path / "hooked", announce=lambda _: None)
    assert not report.failed
    config = report.config
    assert (config.n_layers, config.n_heads, config.d_head, config.d_model, config.d_mlp) == (4, 4, 4, 16, 16)
    assert (config.d_vocab, config.n_ctx) == (16, 16)
    model = HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")
    ids = np.random.default_rng(3).integers(0, 16, (4, 4))
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    logits, cache = model.run_with_cache(ids, attention_mask=mask)
    expected, hooks, _ = made.forward(ids, mask)
    real = mask == 1
    assert list(cache) == list(report.hooks)
    assert set(hooks) == set(cache)
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], **CLOSE)
    for name, value in hooks.items():
        found = np.asarray(cache[name])
        assert found.shape == value.shape, name
        if name.endswith(("scores", "pattern")):  # of queries that are real, at keys that they may see
            seen = np.tril(np.ones((4, 4), bool)) & real[:, None, None, :] & real[:, None, :, None]
            seen = np.broadcast_to(seen, value.shape)
            np.testing.assert_allclose(found[seen], value[seen], **CLOSE, err_msg=name)
        else:
            np.testing.assert_allclose(found[real], value[real], **CLOSE, err_msg=name)
    weights = made.weights()
    for layer in range(4):
        q, k, v = (part.reshape(16, 4, 4).transpose(1, 0, 2) for part in np.split(weights[f"l{layer}.c"], 3, axis=1))
        attn = model.blocks[layer].attn
        for weight, right in ((attn.W_Q, q), (attn.W_K, k), (attn.W_V, v)):
            np.testing.assert_array_equal(np.asarray(weight), right)
        np.testing.assert_array_equal(np.asarray(attn.W_O), weights[f"l{layer}.e"].reshape(4, 4, 16))
        np.testing.assert_array_equal(np.asarray(model.blocks[layer].mlp.W_in), weights[f"l{layer}.i"])
        np.testing.assert_array_equal(np.asarray(model.blocks[layer].mlp.W_out), weights[f"l{layer}.k"])


@pytest.mark.parametrize(("vocabulary", "positions"), [(30, 9), (16, 40), (9, 30), (16, 16)])
def test_a_short_table_is_of_what_it_is_read_by(
    vocabulary: int, positions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of types of tokens, which is short too, has no place in a decoder; this one's positions were taken for it."""
    monkeypatch.setattr(made, "VOCAB", vocabulary)
    monkeypatch.setattr(made, "POSITIONS", positions)
    report = adopt(made.decoder(tmp_path / "model.onnx"), tmp_path / "hooked", announce=lambda _: None)
    assert not report.failed
    assert "embed.hook_token_type_embed" not in report.hooks
    model = HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")
    assert (model.cfg.d_vocab, model.cfg.n_ctx) == (vocabulary, positions)
    weights = made.weights()
    np.testing.assert_array_equal(np.asarray(model.W_E), weights["w0"])
    np.testing.assert_array_equal(np.asarray(model.W_pos), weights["w1"])
    ids = np.random.default_rng(3).integers(0, vocabulary, (2, 5))
    _, cache = model.run_with_cache(ids)
    for name in ("hook_embed", "hook_pos_embed"):
        np.testing.assert_allclose(cache[name], made.forward(ids)[1][name], **CLOSE)


def test_a_row_of_the_originals_weights_changed_in_place_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph's file is the same to the bit, and the weights' has its size and time of change."""
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    file = made.decoder(tmp_path / "model.onnx", external=True)
    ids = np.random.default_rng(3).integers(0, made.VOCAB, (2, 7))
    first = HookedTransformer.from_onnx(file, "cpu", adopt=True)
    before = np.asarray(first(ids))
    np.testing.assert_allclose(before, made.forward(ids)[0], **CLOSE)

    data = tmp_path / "model.onnx.data"
    content, row = data.read_bytes(), made.weights()["l1.k"][5].tobytes()
    assert content.count(row) == 1
    times = data.stat()
    with data.open("r+b") as changed:
        changed.seek(content.index(row))
        changed.write((-np.frombuffer(row, np.float32)).tobytes())
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    right = _run(file, ids)
    assert np.abs(right - before).max() > 1e-2
    np.testing.assert_allclose(HookedTransformer.from_onnx(file, "cpu", adopt=True)(ids), right, **CLOSE)
    np.testing.assert_array_equal(np.asarray(first(ids)), before)  # it has weights of its own


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_an_original_that_is_written_to_meanwhile_is_an_error(name: str, tmp_path: Path) -> None:
    file = made.decoder(tmp_path / "model.onnx", external=True)

    def announce(
        line: str,
    ) -> None:  # the first is said when the original has been read, and before its weights are copied
        with (tmp_path / name).open("ab") as changed:
            changed.write(b"\0")

    with pytest.raises(ModelFileError, match=f"{name}: something wrote to it while it was adopted"):
        adopt(file, tmp_path / "hooked", announce=announce)
    assert not (tmp_path / "hooked").exists()


@pytest.mark.parametrize("at", [1, 2])
def test_stopped_half_way_it_leaves_what_was_there(at: int, tmp_path: Path) -> None:
    original = made.decoder(tmp_path / "model.onnx", seed=1)
    older = tmp_path / "older"
    adopt(made.decoder(tmp_path / "another.onnx"), older, announce=lambda _: None)
    before = {path.name: path.read_bytes() for path in older.iterdir()}
    content, names = original.read_bytes(), set(os.listdir(tmp_path))
    for target, force in ((tmp_path / "new", False), (older, True)):
        said: list[str] = []

        def announce(line: str, said: list[str] = said) -> None:
            said.append(line)
            if len(said) == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            adopt(original, target, force=force, announce=announce)
        assert len(said) == at
    assert set(os.listdir(tmp_path)) == names
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
    assert original.read_bytes() == content


def _run(file: Path, ids: np.ndarray) -> np.ndarray:
    """The original's own logits, from plain ONNX Runtime, which infers no shapes from numbers in another file."""
    shape = (len(ids), made.HEADS, 0, made.D_HEAD)
    past = {
        f"past.{layer}.{part}": np.zeros(shape, np.float32) for layer in range(made.LAYERS) for part in ("key", "value")
    }
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places, **past}
    whole = onnx.load(file).SerializeToString()
    (logits,) = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"]).run(["scores"], feeds)
    return np.asarray(logits)


def test_a_mask_that_cannot_be_read_is_seen_in_a_run(tmp_path: Path) -> None:
    """Where a query stands is taken from where a key does, with no comparison: only patterns tell that no token looks ahead."""
    file = made.decoder(tmp_path / "model.onnx")
    model = onnx.load(file)
    graph = model.graph
    (place,) = (index for index, node in enumerate(graph.node) if node.op_type == "LessOrEqual")
    old = graph.node[place]
    keys, queries = old.input
    ends = {"one": 1, "low": 0, "high": 1}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.array(end, np.int64), name) for name, end in ends.items())
    steps = [
        onnx.helper.make_node("Sub", [queries, keys], ["apart"]),
        onnx.helper.make_node("Add", ["apart", "one"], ["apart1"]),
        onnx.helper.make_node("Clip", ["apart1", "low", "high"], ["clipped"]),
        onnx.helper.make_node("Cast", ["clipped"], [old.output[0]], to=onnx.TensorProto.BOOL),
    ]
    graph.node.remove(old)
    for index, node in enumerate(steps):
        graph.node.insert(place + index, node)
    onnx.save(model, file)
    report = adopt(file, tmp_path / "hooked", announce=lambda _: None)
    assert report.config.is_causal
    assert not report.config.is_encoder
    ids = np.random.default_rng(3).integers(0, made.VOCAB, (2, 5))
    found = HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")(ids)
    np.testing.assert_allclose(found, made.forward(ids)[0], **CLOSE)
