"""Weights of every family by TransformerLens 3.9's names: read, set, and edits put into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from graphlens import Ablate, HookedTransformer, Scale, Steer
from graphlens.errors import InputError
from graphlens.file.names import in_block
from tests.families.comparing import TOLERANCE, prompt, relative
from tests.families.variants import CHOSEN, VARIANTS

Folders = Callable[[str], Path]
Models = Callable[[str], HookedTransformer]
TOKENS = prompt(101, 2, 9)
WITH_LENS = [name for name in CHOSEN if VARIANTS[name].lens is not None]
STACKS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_out", "b_in", "b_out", "W_gate")
AS_STORED = ("_W_K", "_W_V", "_b_K", "_b_V")
# What TransformerLens keeps in a state_dict beside weights.
NO_WEIGHTS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")


@pytest.fixture(scope="module")
def pair(family_model: Models, family_checkpoint: Folders) -> Callable[[str], tuple[HookedTransformer, Any]]:
    """(ours, TransformerLens's) of a variant, by its name."""
    from tests.families.lens import lens_of

    made: dict[str, tuple[HookedTransformer, Any]] = {}

    def find(name: str) -> tuple[HookedTransformer, Any]:
        if name not in made:
            made[name] = family_model(name), lens_of(name, family_checkpoint(name))
        return made[name]

    return find


Pairs = Callable[[str], tuple[HookedTransformer, Any]]


def changed(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights that a graph has, a little otherwise; tied ones stay tied."""
    rng = np.random.default_rng(2)
    return {
        name: weight + 0.1 * rng.standard_normal(weight.shape).astype(np.float32)
        for name, weight in weights.items()
        if np.any(weight) and not name.endswith(("W_E", "W_U"))
    }


@pytest.mark.parametrize("name", WITH_LENS)
def test_the_state_dict_is_transformerlenss(name: str, pair: Pairs) -> None:
    ours, lens = pair(name)
    found = ours.state_dict()
    theirs = {key: value for key, value in lens.state_dict().items() if not key.endswith(NO_WEIGHTS)}
    if ours.cfg.positional_embedding_type == "alibi":
        del theirs["pos_embed.W_pos"]  # which it never reads
    filled = {key for key, value in theirs.items() if key not in found and key.endswith((".w", ".b", "b_in", "b_out"))}
    assert {key for key in filled if not ((theirs[key] == 0).all() or (theirs[key] == 1).all())} == set()
    assert found.keys() - {key for key in found if key.endswith("b_gate")} == theirs.keys() - filled
    for key, weight in found.items():
        if key in theirs:
            assert relative(weight, theirs[key], key) <= 1e-6, key


@pytest.mark.parametrize("name", WITH_LENS)
def test_stacks_and_circuits_are_transformerlenss(name: str, pair: Pairs) -> None:
    """With keys and values once for each head."""
    ours, lens = pair(name)
    for stack in STACKS[:8] if ours.cfg.num_experts else STACKS:
        found, expected = getattr(ours, stack), getattr(lens, stack)
        assert (found is None) == (expected is None), stack
        if found is not None:
            assert relative(found, expected, stack) <= 1e-6
    for circuit in ("QK", "OV"):
        assert relative(getattr(ours, circuit).AB, getattr(lens, circuit).AB, circuit) <= TOLERANCE
        one, other = (getattr(model.blocks[1].attn, circuit).AB for model in (ours, lens))
        assert relative(one, other, circuit) <= TOLERANCE
    for mode in "QKV":
        assert relative(ours.all_composition_scores(mode), lens.all_composition_scores(mode), mode) <= TOLERANCE
    if ours.cfg.n_key_value_heads != ours.cfg.n_heads:
        for stored in AS_STORED:
            found, expected = (getattr(model.blocks[1].attn, stored) for model in (ours, lens))
            assert len(found) == ours.cfg.n_key_value_heads
            assert relative(found, expected, stored) <= 1e-6


@pytest.mark.parametrize("name", WITH_LENS)
def test_parts_compute_what_transformerlenss_do(name: str, pair: Pairs) -> None:
    ours, lens = pair(name)
    x = np.random.default_rng(3).standard_normal((2, 5, ours.cfg.d_model)).astype(np.float32)
    given = torch.from_numpy(x)
    assert relative(ours.ln_final(x), lens.ln_final(given), "ln_final") <= TOLERANCE
    assert relative(ours.unembed(x), lens.unembed(given), "unembed") <= TOLERANCE
    assert relative(ours.embed(TOKENS), lens.embed(torch.from_numpy(TOKENS)), "embed") <= TOLERANCE
    for norm in ("ln1", "ln2", "ln1_post", "ln2_post"):
        theirs = getattr(lens.blocks[1], norm, None)
        if theirs is not None:
            assert relative(getattr(ours.blocks[1], norm)(x), theirs(given), norm) <= TOLERANCE
        else:
            with pytest.raises(AttributeError, match=norm):
                getattr(ours.blocks[1], norm)
    directions = ours.tokens_to_residual_directions([3, 5])
    assert relative(directions, lens.tokens_to_residual_directions(torch.tensor([3, 5])), "directions") <= 1e-6
    if not ours.cfg.num_experts:
        assert relative(ours.accumulated_bias(2), lens.accumulated_bias(2), "accumulated_bias") <= 1e-6


@pytest.mark.parametrize("name", CHOSEN)
def test_setting_what_there_is_changes_nothing(name: str, family_model: Models) -> None:
    model = family_model(name)
    model.set_weights(model.state_dict())
    assert not model.runner.engine.replaced


@pytest.mark.parametrize("name", WITH_LENS)
def test_weights_that_were_set_are_computed_with(name: str, family_model: Models, family_checkpoint: Folders) -> None:
    """TransformerLens with the same weights loaded."""
    from tests.families.lens import lens_of

    model, lens = family_model(name), lens_of(name, family_checkpoint(name))
    if name.startswith(("phi", "gptj")):
        pytest.skip("its two norms are one tensor, which TransformerLens has twice")
    before, new = model(TOKENS), changed(model.state_dict())
    state = lens.state_dict()
    new = {key: weight for key, weight in new.items() if key in state}
    lens.load_state_dict({key: torch.from_numpy(weight) for key, weight in new.items()}, strict=False)
    model.set_weights(new)
    for key, weight in new.items():
        assert relative(model.state_dict()[key], weight, key) <= 1e-6
    expected = lens(torch.from_numpy(TOKENS))
    assert relative(model(TOKENS), expected, name) <= TOLERANCE
    assert relative(before, expected, name) > 0.01
    model.reset_weights()
    np.testing.assert_array_equal(model(TOKENS), before)


@pytest.mark.parametrize("name", CHOSEN)
def test_embedding_and_unembedding_are_set_apart(name: str, family_model: Models) -> None:
    """Whether the checkpoint has one tensor for both or not, and with the factor of Gemma's embedding."""
    model = family_model(name)
    tokens, (_, cache) = TOKENS[:1], model.run_with_cache(TOKENS[:1])
    doubled = 2 * model.W_E
    if "embed.W_project" in model.weights:
        with pytest.raises(
            InputError, match=r"'embed.W_E' is the product of 'embed.W_tokens' and 'embed.W_project' .*set these"
        ):
            model.set_weights({"embed.W_E": doubled})
        model.set_weights({"embed.W_tokens": 2 * model.embed.W_tokens})
    else:
        model.set_weights({"embed.W_E": doubled})
    assert relative(model.W_E, doubled, "W_E") <= 1e-6
    _, after = model.run_with_cache(tokens)
    if not model.cfg.post_embedding_ln:
        assert relative(after["hook_embed"], 2 * cache["hook_embed"], "hook_embed") <= 1e-6
    expected = model.unembed(after["unembed.hook_in"])
    assert relative(after["unembed.hook_out"], expected, "unembed.hook_out") <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_shared_keys_are_set_once_or_for_each_head(name: str, family_model: Models) -> None:
    model = family_model(name)
    whole, stored = (getattr(model.blocks[0].attn, name) for name in ("W_K", AS_STORED[0]))
    assert (len(whole), len(stored)) == (model.cfg.n_heads, model.cfg.n_key_value_heads)
    logits = []
    for given in ({"attn.W_K": 2 * whole}, {"attn._W_K": 2 * stored}, {"attn.W_K": 2 * stored}):
        model.set_weights({in_block(0, key): weight for key, weight in given.items()})
        logits.append(model(TOKENS))
        model.reset_weights()
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])
    uneven = np.array(whole)
    uneven[0] += 1
    with pytest.raises(InputError, match=r"heads share each key and value in this model.*Set 'blocks.0.attn._W_K'"):
        model.set_weights({in_block(0, "attn.W_K"): uneven})
    with pytest.raises(InputError, match=r"attn.W_K' and 'blocks.0.attn._W_K' are one weight: set one of them"):
        model.set_weights({in_block(0, "attn.W_K"): whole, in_block(0, "attn._W_K"): 2 * stored})
    np.testing.assert_array_equal(model.blocks[0].attn.W_K, whole)


def interventions(model: HookedTransformer) -> list[Any]:
    """Edits that are the same at every position, at hook points that matrices read and write."""
    rng = np.random.default_rng(4)

    def vector(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes).astype(np.float32)

    cfg = model.cfg
    edits: list[Any] = [
        Ablate(in_block(0, "attn.hook_z"), heads=1),
        Steer(in_block(0, "attn.hook_q"), vector(cfg.d_head), heads=0),
        Steer(in_block(1, "attn.hook_k"), vector(cfg.n_key_value_heads, cfg.d_head)),
        Scale(in_block(1, "attn.hook_v"), 0.5, heads=0),
        Steer(in_block(1, "hook_attn_out"), vector(cfg.d_model)),
        Steer(in_block(2, "hook_resid_pre"), vector(cfg.d_model)),
        Steer(in_block(2, "hook_mlp_out"), vector(cfg.d_model), coefficient=0.5),
    ]
    if not cfg.num_experts:
        edits += [
            Ablate(in_block(0, "mlp.hook_pre"), dims=[3, 5]),
            Ablate(in_block(0, "mlp.hook_post"), dims=[7]),
        ]
    if cfg.gated_mlp and not cfg.num_experts:
        edits.append(Ablate(in_block(1, "mlp.hook_pre_linear"), dims=[2]))
    return edits


@pytest.mark.parametrize("name", CHOSEN)
def test_baked_is_hooked(name: str, family_model: Models, tmp_path: Path) -> None:
    """Edits that go into weights, and those that a norm or a missing bias keeps out of them, in a bare session."""
    model = family_model(name)
    items = interventions(model)
    with model.intervene(items):
        expected = model(TOKENS)
    assert relative(expected, model(TOKENS), name) > 0.01
    for count in (len(items), 1):
        out = model.bake(items[:count], tmp_path / f"baked-{count}")
        (found,) = onnxruntime.InferenceSession(out / "model.onnx").run(["logits"], {"input_ids": TOKENS})
        with model.intervene(items[:count]):
            assert relative(found, model(TOKENS), name) <= TOLERANCE


@pytest.mark.parametrize(("name", "folds"), [("llama", True), ("neox", True), ("gemma3", True)])
def test_an_edit_of_z_costs_nothing(name: str, folds: bool, family_folder: Folders) -> None:
    """Through norms after attention too: it goes into the output matrix."""
    from graphlens import surgery
    from graphlens.surgery.bake import bake as baked

    model = surgery.load(family_folder(name))
    plain, _ = baked(model, [])
    edited, weights = baked(model, [Ablate("blocks.1.attn.hook_z", heads=1)])
    assert bool(weights) == folds
    assert [node.op_type for node in edited.graph] == [node.op_type for node in plain.graph]
