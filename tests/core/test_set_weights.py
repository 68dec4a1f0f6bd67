"""Weights that are set: every route computes with them, a file holds them, and nothing is changed where one does not fit."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from graphlens import Ablate, HookedTransformer, KeyValueCache, Scale, Steer, process_weights, utils
from graphlens.engine import engine, packed_weights
from graphlens.engine.session_pool import SessionPool
from graphlens.errors import InputError
from graphlens.file.safetensors import SafetensorsFile
from graphlens.metrics import LogitDiff
from graphlens.patching import get_act_patch_resid_pre
from graphlens.surgery.precision import convert_into
from tests.closeness import close
from tests.hub_cache import in_the_hubs_cache

TOKENS = np.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
Q, OUT, E, U = "blocks.1.attn.W_Q", "blocks.2.attn.W_O", "embed.W_E", "unembed.W_U"
METRIC = LogitDiff(5, 7)


def opened(folder: Path, **options: Any) -> HookedTransformer:
    return HookedTransformer.from_onnx(folder, "cpu", **options)


def random(model: HookedTransformer, *names: str) -> dict[str, np.ndarray]:
    """Other weights of the same size, so that the model stays one."""
    generator = np.random.default_rng(7)
    weights = model.state_dict()
    return {name: generator.permuted(weights[name].astype(np.float64), axis=-1) * 0.9 for name in names}


NAMES = (
    *(Q, "blocks.0.attn.b_K", OUT, "blocks.1.attn.b_O", "blocks.0.mlp.W_in", "blocks.3.mlp.b_out", "blocks.2.ln1.w"),
    *("ln_final.b", "pos_embed.W_pos"),
)


@pytest.fixture(scope="module")
def edited_file(tiny_folder: Path, tiny: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, written over the bytes of a copy of the file by hand, for plain ONNX Runtime."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("by hand") / "model"))
    new = {name: array.astype(np.float32) for name, array in random(tiny, *NAMES).items()}
    file, width = SafetensorsFile(folder / "model.safetensors"), tiny.cfg.d_model
    tensors = {name: np.array(file.array(name)) for name in file.entries}
    heads = tiny.cfg.n_heads
    tensors["transformer.h.1.attn.c_attn.weight"][:, :width] = np.concatenate(list(new[Q]), 1)
    tensors["transformer.h.0.attn.c_attn.bias"][width : 2 * width] = new["blocks.0.attn.b_K"].ravel()
    tensors["transformer.h.2.attn.c_proj.weight"][:] = np.concatenate([new[OUT][head] for head in range(heads)])
    tensors["transformer.h.1.attn.c_proj.bias"][:] = new["blocks.1.attn.b_O"]
    tensors["transformer.h.0.mlp.c_fc.weight"][:] = new["blocks.0.mlp.W_in"]
    tensors["transformer.h.3.mlp.c_proj.bias"][:] = new["blocks.3.mlp.b_out"]
    tensors["transformer.h.2.ln_1.weight"][:] = new["blocks.2.ln1.w"]
    tensors["transformer.ln_f.bias"][:] = new["ln_final.b"]
    tensors["transformer.wpe.weight"][:] = new["pos_embed.W_pos"]
    with file.path.open("r+b") as raw:
        for name, entry in file.entries.items():
            raw.seek(entry.offset)
            raw.write(tensors[name].tobytes())
    return folder


@pytest.fixture(scope="module")
def edited(tiny_folder: Path, tiny: HookedTransformer) -> HookedTransformer:
    model = opened(tiny_folder)
    model(TOKENS)  # a session over the file's own weights is open before
    model.set_weights(random(tiny, *NAMES))
    return model


@pytest.fixture(scope="module")
def baked(edited: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> HookedTransformer:
    return opened(edited.bake([], tmp_path_factory.mktemp("baked") / "model", keep_hooks=True))


def test_runs_are_those_of_a_file_that_holds_the_weights(edited: HookedTransformer, edited_file: Path) -> None:
    session = onnxruntime.InferenceSession(str(edited_file / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [entry.value for entry in edited.runner.engine.manifest.hooks.values()]
    expected = dict(zip(names, session.run(names, {"input_ids": TOKENS}), strict=True))
    logits, cache = edited.run_with_cache(TOKENS)
    np.testing.assert_array_equal(logits, expected["logits"])
    for name, entry in edited.runner.engine.manifest.hooks.items():
        np.testing.assert_array_equal(cache[name], expected[entry.value])
    for part in ("hook_resid_pre", "hook_resid_post"):
        x = cache[f"blocks.2.{part}"]
        close(edited(x, start_at_layer=2 if part.endswith("pre") else 3), logits)


def test_weights_read_as_what_was_set(edited: HookedTransformer, tiny: HookedTransformer) -> None:
    new, state = random(tiny, *NAMES), edited.state_dict()
    for name, before in tiny.state_dict().items():
        np.testing.assert_array_equal(state[name], new[name].astype(np.float32) if name in new else before)
        assert not state[name].flags.writeable
    np.testing.assert_array_equal(edited.W_Q[1], state[Q])
    np.testing.assert_array_equal(edited.blocks[2].attn.W_O, state[OUT])
    np.testing.assert_array_equal(edited.weights[OUT], state[OUT])
    np.testing.assert_allclose(edited.OV.AB[2], tiny.W_V[2] @ state[OUT], atol=1e-5)
    biases = state["blocks.1.attn.b_O"] + tiny.b_O[0] + tiny.b_out[:2].sum(0)
    np.testing.assert_allclose(edited.accumulated_bias(2), biases, atol=1e-6)


def routes(model: HookedTransformer) -> dict[str, Callable[[], Any]]:
    """What computes with a model in other sessions than the plain one."""
    z = "blocks.2.attn.hook_z"

    def split() -> Any:
        model.set_use_split_qkv_input(True)
        model.set_use_attn_result(True)
        try:
            return model.run_with_cache(TOKENS)[1]["blocks.2.attn.hook_result"]
        finally:
            model.set_use_split_qkv_input(False)
            model.set_use_attn_result(False)

    def cached() -> Any:
        past = KeyValueCache.init_cache(model.cfg, batch_size=2)
        model(TOKENS[:, :3], past_kv_cache=past)
        return model(TOKENS[:, 3:], past_kv_cache=past)

    def sweep() -> Any:
        _, clean = model.run_with_cache(TOKENS[::-1])
        return np.asarray(get_act_patch_resid_pre(model, TOKENS, clean, METRIC))

    def attributed() -> Any:
        _, cache = model.run_with_cache(TOKENS)
        return cache.logit_attrs(cache.stack_head_results(apply_ln=True), 5, 7)

    return {
        "Python hooks": lambda: model.run_with_hooks(TOKENS, fwd_hooks=[(z, lambda x, hook: x * 0.5)]),
        "interventions": lambda: model.run_with_interventions(TOKENS, [Scale(z, 0.5), Steer("hook_embed", 0.1)]),
        "flags": split,
        "a KV cache": cached,
        "generation": lambda: model.generate(TOKENS, max_new_tokens=4, do_sample=False, verbose=False),
        "gradients": lambda: model.gradients(TOKENS, METRIC, "blocks.1.hook_resid_pre")["blocks.1.hook_resid_pre"],
        "the loss": lambda: model(TOKENS, return_type="loss"),
        "a sweep": sweep,
        "a cache's algebra": attributed,
        "stopping early": lambda: model(TOKENS, stop_at_layer=3),
        "composition": lambda: model.all_composition_scores("Q"),
        "parts": lambda: model.unembed(model.ln_final(model.embed(TOKENS))),
    }


@pytest.mark.parametrize("route", list(routes(None)))  # type: ignore[arg-type]
def test_every_route_is_that_of_a_file_that_holds_the_weights(
    route: str, edited: HookedTransformer, baked: HookedTransformer, tiny: HookedTransformer
) -> None:
    found = np.asarray(routes(edited)[route]())
    close(found, np.asarray(routes(baked)[route]()))
    assert not np.allclose(found, np.asarray(routes(tiny)[route]()), atol=1e-4)


def test_a_baked_file_computes_the_same_without_graphlens(edited: HookedTransformer, tmp_path: Path) -> None:
    steer = Steer("blocks.1.hook_mlp_out", np.linspace(-1, 1, edited.cfg.d_model).astype(np.float32))
    folder = edited.bake(steer, tmp_path / "baked")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    close(session.run(["logits"], {"input_ids": TOKENS})[0], edited.run_with_interventions(TOKENS, steer))
    assert [path.name for path in tmp_path.iterdir()] == ["baked"]
    with pytest.raises(InputError, match="hook_mlp_out"):
        edited.bake(Steer("blocks.1.hook_mlp_out", np.ones(3, np.float32)), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["baked"]


def test_a_baked_file_may_be_set_baked_and_processed_again(
    baked: HookedTransformer, tiny: HookedTransformer, tmp_path: Path
) -> None:
    again = copy.deepcopy(baked)
    again.set_weights({OUT: tiny.blocks[2].attn.W_O, "blocks.3.attn.b_V": np.ones((4, 32))})
    folder = again.bake([], tmp_path / "again", keep_hooks=True)
    logits = again(TOKENS)
    np.testing.assert_array_equal(opened(folder)(TOKENS), logits)
    processed = opened(process_weights(folder, tmp_path / "processed"))(TOKENS)
    close(processed - processed.mean(-1, keepdims=True), logits - logits.mean(-1, keepdims=True), 1e-3)


# The way back, and copies


def test_weights_are_reset(tiny_folder: Path, tiny: HookedTransformer) -> None:
    model = opened(tiny_folder)
    model.set_weights({OUT: np.zeros_like(tiny.blocks[2].attn.W_O)})
    model.set_weights({"blocks.0.mlp.b_in": np.ones(tiny.cfg.d_mlp)})
    assert not model.W_O[2].any()  # what was set before stays set
    attn_out = model.run_with_cache(TOKENS)[1]["blocks.2.hook_attn_out"]
    np.testing.assert_array_equal(attn_out, np.broadcast_to(tiny.b_O[2], attn_out.shape))
    model.reset_weights()
    np.testing.assert_array_equal(model(TOKENS), tiny(TOKENS))
    assert model.runner.identity == tiny.runner.identity
    model.set_weights(tiny.state_dict())  # what the file holds is nothing new
    assert model.runner.identity == tiny.runner.identity


def test_copies_keep_the_weights_that_they_have(tiny_folder: Path, tiny: HookedTransformer) -> None:
    model = opened(tiny_folder)
    before = copy.deepcopy(model)
    model.set_weights({OUT: tiny.blocks[2].attn.W_O * 2, E: tiny.W_E * 0.5})
    after, stored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    logits = model(TOKENS)
    model.reset_weights()
    np.testing.assert_array_equal(before(TOKENS), tiny(TOKENS))
    for other in (after, stored):
        np.testing.assert_array_equal(other(TOKENS), logits)
        assert other.runner.identity == after.runner.identity != tiny.runner.identity


def test_what_other_weights_filled_is_refused(tiny_folder: Path) -> None:
    model = opened(tiny_folder)
    past = KeyValueCache.init_cache(model.cfg, batch_size=2)
    model(TOKENS, past_kv_cache=past)
    model.set_weights({OUT: model.blocks[2].attn.W_O * 2})
    with pytest.raises(InputError, match="another model"):
        model(TOKENS[:, :1], past_kv_cache=past)


def test_hooks_and_interventions_stay_active(tiny_folder: Path) -> None:
    model, z = opened(tiny_folder), "blocks.2.attn.hook_z"
    new = {OUT: model.blocks[2].attn.W_O * 2}
    other = copy.deepcopy(model)
    other.set_weights(new)
    expected = other.run_with_interventions(TOKENS, Scale(z, 0.5))
    with model.intervene(Scale(z, 0.5)):
        model.set_weights(new)
        close(model(TOKENS), expected)
    model.reset_weights()
    with model.hooks(fwd_hooks=[(z, lambda x, hook: x * 0.5)]):
        model.set_weights(new)
        close(model(TOKENS), expected)


# Tensors that several weights share


def test_an_embedding_is_set_apart_from_the_unembedding_that_is_the_same_tensor(
    tiny_folder: Path, tiny: HookedTransformer, tmp_path: Path
) -> None:
    model, new = opened(tiny_folder), random(tiny, E)[E].astype(np.float32)
    model.set_weights({E: new})
    logits, cache = model.run_with_cache(TOKENS)
    np.testing.assert_array_equal(cache["hook_embed"], new[TOKENS])
    np.testing.assert_array_equal(model.W_U, tiny.W_U)
    close(logits, cache["unembed.hook_in"] @ tiny.W_U)
    again = opened(model.bake([], tmp_path / "baked", keep_hooks=True))
    np.testing.assert_array_equal(again(TOKENS), logits)
    np.testing.assert_array_equal(again.W_E, new)
    np.testing.assert_array_equal(again.W_U, tiny.W_U)

    model.reset_weights()
    model.set_weights({U: new.T})
    logits, cache = model.run_with_cache(TOKENS)
    np.testing.assert_array_equal(cache["hook_embed"], tiny.W_E[TOKENS])
    close(logits, cache["unembed.hook_in"] @ new.T)
    scaled = model.run_with_interventions(TOKENS, Scale("unembed.hook_in", 2.0))
    close(scaled, 2 * logits)

    apart = opened(tiny_folder)
    apart.set_weights({E: new})
    apart(TOKENS)  # stays open while the next session is asked for
    model.set_weights({E: new})  # one tensor again
    assert model.runner.identity != apart.runner.identity
    logits, cache = model.run_with_cache(TOKENS)
    np.testing.assert_array_equal(cache["hook_embed"], new[TOKENS])
    close(logits, cache["unembed.hook_in"] @ new.T)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_weights_of_another_dtype(dtype: str, tiny_folder: Path, tiny: HookedTransformer, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    convert_into(tiny_folder / "model.onnx", tmp_path / "model", dtype)
    model = opened(tmp_path / "model")
    new, embedding = (random(tiny, name)[name] for name in (OUT, E))
    model.set_weights({OUT: new, E: embedding})
    stored = model.blocks[2].attn.W_O
    step = {"float64": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert np.abs(stored - new).max() <= step * np.abs(new).max()
    assert (dtype == "float64") == np.array_equal(stored, new)
    _, cache = model.run_with_cache(TOKENS)
    wide = np.float64
    expected = (
        np.einsum("bphd,hdD->bpD", cache["blocks.2.attn.hook_z"].astype(wide), stored.astype(wide)) + model.b_O[2]
    )
    close(cache["blocks.2.hook_attn_out"].astype(wide), expected, 1e-12 if dtype == "float64" else 2e-3)
    np.testing.assert_array_equal(cache["hook_embed"], model.W_E[TOKENS].astype(cache["hook_embed"].dtype))
    np.testing.assert_array_equal(model.W_U.shape, tiny.W_U.shape)
    again = opened(model.bake([], tmp_path / "baked", keep_hooks=True))
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    assert again.dtype == model.dtype
    if dtype == "float16":
        with pytest.raises(InputError, match="too large for the float16"):
            model.set_weights({OUT: np.full(new.shape, 1e6)})


def test_a_model_opened_with_fewer_positions(tiny_folder: Path, tiny: HookedTransformer) -> None:
    model = opened(tiny_folder, n_ctx=7)
    new = random(tiny, "pos_embed.W_pos")["pos_embed.W_pos"][:7].astype(np.float32)
    model.set_weights({"pos_embed.W_pos": new})
    np.testing.assert_array_equal(model.W_pos, new)
    np.testing.assert_array_equal(model.run_with_cache(TOKENS)[1]["hook_pos_embed"][0], new[:5])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model))(TOKENS), model(TOKENS))
    with pytest.raises(InputError, match=r"is \[7, 128\]"):
        model.set_weights({"pos_embed.W_pos": tiny.W_pos})


# What is refused


SHAPE = (4, 32, 128)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"W_O": np.zeros(SHAPE)}, r"no weight 'W_O'.*'blocks\.0\.attn\.W_O'"),
        ({"blocks.9.attn.W_O": np.zeros(SHAPE)}, r"no weight 'blocks\.9\.attn\.W_O'.*Nearest"),
        ({"blocks.0.mlp.W_gate": np.zeros(SHAPE)}, "no weight"),
        ({OUT: np.zeros((4, 128, 32))}, r"is \[4, 32, 128\].*\[4, 128, 32\]"),
        ({OUT: 0.0}, r"to be set to is \[\]"),
        ({OUT: np.zeros(SHAPE, int)}, "int64"),
        ({OUT: np.zeros(SHAPE, complex)}, "complex128"),
        ({OUT: np.zeros(SHAPE, bool)}, "bool"),
        ({OUT: np.full(SHAPE, np.nan)}, "not finite"),
        ({OUT: np.full(SHAPE, 1e39)}, "too large for the float32"),
        ({"unembed.b_U": np.ones(800)}, "no such bias"),
        ({"unembed.b_U": np.zeros(7)}, r"\[800\] zeros"),
        ({OUT: [[0.0], [0.0, 1.0]]}, f"{OUT}.*cannot be read as an array"),
        ({1: np.zeros(SHAPE)}, "name is text, not int"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    wrong: dict[str, Any], why: str, edited: HookedTransformer
) -> None:
    engine, logits = edited.runner.engine, edited(TOKENS)
    with pytest.raises(InputError, match=why):
        edited.set_weights({Q: np.zeros((4, 128, 32)), **wrong})
    assert edited.runner.engine is engine
    np.testing.assert_array_equal(edited(TOKENS), logits)


@pytest.mark.parametrize("wrong", [None, [OUT], "W_O", np.zeros(3)], ids=str)
def test_weights_are_given_as_a_dict(wrong: Any, tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="given as a dict of name -> array"):
        tiny.set_weights(wrong)


@pytest.mark.parametrize("path", ["~no-such-user/baked", "a\0b", "", 3, None, b"baked"], ids=repr)
def test_a_path_that_is_none_is_refused_as_by_a_model_with_its_own_weights(
    path: Any, edited: HookedTransformer, tiny: HookedTransformer
) -> None:
    said = []
    for model in (tiny, edited):
        with pytest.raises(InputError) as error:
            model.bake([], path)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_arrays_of_weights_are_read_only_all_the_way_down(edited: HookedTransformer, tiny: HookedTransformer) -> None:
    attn = [f"{kind}_{letter}" for kind in "Wb" for letter in "QKVO"]
    for model in (tiny, edited):
        stacked = [
            getattr(model, name)
            for name in (*attn, "W_in", "b_in", "W_out", "b_out", "W_E", "W_pos", "W_U", "b_U", "W_E_pos")
        ]
        parts = [getattr(model.blocks[1].attn, name) for name in attn]
        factors = [factor for matrix in (model.OV, model.blocks[1].attn.QK) for factor in (matrix.A, matrix.B)]
        for weight in (*stacked, *parts, *factors, *model.weights.values(), *model.parameters()):
            for array in (weight, weight.T, weight[:1], weight.base):
                if isinstance(array, np.ndarray):
                    with pytest.raises(ValueError, match="read-only"):
                        array[...] = 0
    with pytest.raises(AttributeError):
        tiny.blocks[0].attn.W_O = tiny.blocks[1].attn.W_O


def test_composition_scores_of_utils_take_read_only_factors(edited: HookedTransformer) -> None:
    first, second = edited.OV[1], edited.QK[2]
    norm = np.linalg.norm
    whole = norm(first[0].AB @ second[1].AB) / norm(first[0].AB) / norm(second[1].AB)
    np.testing.assert_allclose(utils.composition_scores(first, second)[0, 1], whole, rtol=1e-4)


# Beside packed weights, links, and a generation that is under way


def of_several_sessions(model: HookedTransformer) -> list[np.ndarray]:
    """What sessions of several kinds give."""
    _, cache = model.run_with_cache(TOKENS)
    return [
        model(TOKENS),
        model.run_with_interventions(TOKENS, Ablate("blocks.1.attn.hook_z", heads=2)),
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0.5)]),
        model(TOKENS, stop_at_layer=3),
        np.asarray(get_act_patch_resid_pre(model, TOKENS[:, ::-1], cache, METRIC)),
    ]


def test_weights_that_are_set_are_not_those_that_were_packed(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRAPHLENS_PACKED_LIMIT", raising=False)
    monkeypatch.setattr(packed_weights, "LEAST", 0)
    monkeypatch.setattr(engine, "POOL", SessionPool())
    model = opened(tiny_copy)
    before = of_several_sessions(model)
    assert list((tmp_path / "cache" / "packed").iterdir())
    other = model.state_dict()[OUT] * np.float32(-1.5)
    model.set_weights({OUT: other})
    found = of_several_sessions(model)
    assert not any(np.allclose(one, two, atol=1e-3) for one, two in zip(found[:4], before[:4], strict=True))
    by_file = opened(model.bake([], tmp_path / "baked", keep_hooks=True))
    np.testing.assert_array_equal(by_file.state_dict()[OUT], other)
    for one, two in zip(found, of_several_sessions(by_file), strict=True):
        close(one, two)
    model.reset_weights()
    for one, two in zip(of_several_sessions(model), before, strict=True):
        close(one, two)


def test_weights_are_set_in_the_hubs_cache_too(tiny_copy: Path, tmp_path: Path) -> None:
    """There the files are links, and graphs in memory name the files behind them."""
    plain, linked = (opened(folder) for folder in (tiny_copy, in_the_hubs_cache(tiny_copy, tmp_path / "hub")))
    other = plain.state_dict()[OUT] * np.float32(-1.5)
    for model in (plain, linked):
        model.set_weights({OUT: other})
    for one, two in zip(of_several_sessions(linked), of_several_sessions(plain), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("cached", [True, False])
def test_weights_that_are_set_in_the_midst_of_a_generation_end_it(cached: bool, tiny_copy: Path) -> None:
    """The keys and values that it has are those of the weights of before."""
    model = opened(tiny_copy)
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    stream = model.generate_stream(TOKENS, 6, max_tokens_per_yield=1, use_past_kv_cache=cached, **options)
    next(stream)
    next(stream)
    model.set_weights({OUT: model.state_dict()[OUT] * np.float32(-1.5)})
    with pytest.raises(InputError, match="weights were set while it generated"):
        list(stream)
    assert model.generate(TOKENS, 6, use_past_kv_cache=cached, **options).shape == (2, 11)
