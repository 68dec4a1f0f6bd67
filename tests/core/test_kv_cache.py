"""The KV cache: padding on either side is no part of a prompt, edits stay in it, and it serves the model that filled it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, HookedTransformer, InputError, Patch, Scale, Steer, process_weights, surgery
from graphlens.file.names import FLAGGED
from graphlens.interventions import Intervention
from graphlens.model.kv_cache import KeyValueCache

FIRST = ["When John and Mary went", "The", "Once upon"]
SECOND = [" to", " cat", " a"]  # one token each


@pytest.fixture
def model(tiny: HookedTransformer) -> Iterator[HookedTransformer]:
    """The embedded model without flags, before and after."""
    yield tiny
    for flag in set(FLAGGED.values()):
        getattr(tiny, f"set_{flag}")(False)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 5e-5 * max(1.0, np.abs(expected).max())


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_padding_is_no_part_of_what_later_tokens_see(kind: str, side: str, model: HookedTransformer) -> None:
    cache = KeyValueCache.init_cache(model.cfg, batch_size=3)
    given = FIRST if kind == "text" else model.to_tokens(FIRST, padding_side=side)
    first = model.forward(given, padding_side=side, past_kv_cache=cache)
    second = model.forward(SECOND, prepend_bos=False, padding_side=side, past_kv_cache=cache)
    assert cache.mask.sum(1).tolist() == [model.to_tokens(text).shape[1] + 1 for text in FIRST]
    for row, (start, end) in enumerate(zip(FIRST, SECOND, strict=True)):
        alone = model.forward(start + end)
        close(second[row, -1], alone[0, -1])
        length = alone.shape[1] - 1
        close(first[row, -length:] if side == "left" else first[row, :length], alone[0, :-1])


def test_an_end_token_of_a_text_is_no_padding_and_of_ids_it_is(model: HookedTransformer) -> None:
    texts = ["When John and<|endoftext|>", "The"]
    lengths = [model.to_tokens(text).shape[1] for text in texts]
    for given, unseen in ((texts, 0), (model.to_tokens(texts), 1)):
        cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
        model.forward(given, past_kv_cache=cache)
        assert cache.mask.sum(1).tolist() == [lengths[0] - unseen, lengths[1]]


def test_padding_of_a_cached_run_counts_for_no_loss(model: HookedTransformer) -> None:
    cache = KeyValueCache.init_cache(model.cfg, batch_size=3)
    losses = model.forward(FIRST, return_type="loss", loss_per_token=True, past_kv_cache=cache)
    for row, text in zip(losses, FIRST, strict=True):
        alone = model.forward(text, return_type="loss", loss_per_token=True)[0]
        close(row[: alone.size], alone)
        assert not row[alone.size :].any()


def test_a_piece_may_be_all_padding(model: HookedTransformer, tokens: np.ndarray) -> None:
    mask = np.asarray([[0, 0, 0, 1, 1, 1], [1] * 6])
    cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
    pieces = [
        model.forward(tokens[:, at : at + 2], attention_mask=mask[:, at : at + 2], past_kv_cache=cache)
        for at in (0, 2, 4)
    ]
    close(np.concatenate(pieces, 1)[mask == 1], model.forward(tokens, attention_mask=mask)[mask == 1])


# Edits


@pytest.mark.parametrize("part", ["k", "v"])
def test_an_edited_key_or_value_stays_in_the_cache(part: str, model: HookedTransformer, tokens: np.ndarray) -> None:
    name = f"blocks.1.attn.hook_{part}"
    change = np.random.default_rng(0).standard_normal((2, 4, model.cfg.n_heads, model.cfg.d_head)).astype(np.float32)

    def edit(value: np.ndarray, hook: Any) -> None:
        value[:, :4] += change

    whole = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
    cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
    first = model.run_with_hooks(tokens[:, :4], fwd_hooks=[(name, edit)], past_kv_cache=cache)
    rest = model.forward(tokens[:, 4:], past_kv_cache=cache)  # no hook stands any more
    close(np.concatenate([first, rest], 1), whole)
    assert np.abs(rest - model.forward(tokens)[:, 4:]).max() > 1e-2


EDITS = {
    "use_attn_result": "blocks.1.attn.hook_result",
    "use_split_qkv_input": "blocks.1.hook_k_input",
    "use_attn_in": "blocks.1.hook_attn_in",
    "use_hook_mlp_in": "blocks.1.hook_mlp_in",
    "use_hook_tokens": "hook_tokens",
}


def turn(value: np.ndarray, hook: Any) -> np.ndarray:
    """Another value everywhere that depends on the value alone, not on where it stands."""
    return (value + 7) % 700 if value.dtype.kind == "i" else value * np.float32(-0.5)


@pytest.mark.parametrize(("flag", "name"), EDITS.items(), scope="module")  # a flag's cases together find sessions open
@pytest.mark.parametrize("padded", [False, True])
def test_flagged_hooks_act_on_cached_steps(
    padded: bool, flag: str, name: str, model: HookedTransformer, tokens: np.ndarray
) -> None:
    getattr(model, f"set_{flag}")(True)
    mask = np.asarray([[0, 0, 1, 1, 1, 1], [1] * 6]) if padded else np.ones((2, 6), np.int64)
    plain = model.forward(tokens, attention_mask=mask)
    cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
    with model.hooks(fwd_hooks=[(name, turn)]):
        whole = model.forward(tokens, attention_mask=mask)
        pieces = [
            model.forward(tokens[:, a:b], attention_mask=mask[:, a:b], past_kv_cache=cache)
            for a, b in ((0, 3), (3, 4), (4, 6))
        ]
        options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "attention_mask": mask}
        cached, uncached = (
            model.generate(tokens, 12, use_past_kv_cache=use_past_kv_cache, **options)
            for use_past_kv_cache in (True, False)
        )
    real = mask == 1
    close(np.concatenate(pieces, 1)[real], whole[real])
    assert np.abs(whole[real] - plain[real]).max() > 1e-2
    np.testing.assert_array_equal(cached, uncached)
    np.testing.assert_array_equal(cached[:, 6], whole[:, -1].argmax(-1))


# Whose it is


def edited_copy(folder: Path, out: Path) -> Path:
    """The model with one weight changed, under the same name."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, out)
    arrays = load_file(out / "model.safetensors")
    name = next(name for name in arrays if name.endswith("h.1.attn.c_attn.weight"))
    arrays[name] = arrays[name] * np.float32(1.5)
    save_file(arrays, out / "model.safetensors", metadata={"format": "pt"})
    model = surgery.load(out, verify=False)
    manifest = surgery.read_manifest(model)
    from graphlens.surgery.graph import write_manifest

    write_manifest(model, manifest.with_files({name: surgery.fingerprint(out / name) for name in manifest.files}))
    return surgery.save(model, out.with_name("saved")).parent


def test_a_cache_serves_the_model_that_filled_it(model: HookedTransformer, tiny_folder: Path, tmp_path: Path) -> None:
    off = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    others = {
        "processed": process_weights(tiny_folder, tmp_path / "processed"),
        "refactored": process_weights(tiny_folder, tmp_path / "r", **off, refactor_factored_attn_matrices=True),
        "tuned": edited_copy(tiny_folder, tmp_path / "tuned"),
    }
    tokens = np.arange(1, 9)[None]
    for name, folder in others.items():
        other = HookedTransformer.from_onnx(folder, "cpu")
        assert other.cfg.model_name == model.cfg.model_name, name
        assert other.cfg.d_head == model.cfg.d_head
        for one, two in ((model, other), (other, model)):
            cache = KeyValueCache.init_cache(one.cfg)
            one.forward(tokens[:, :5], past_kv_cache=cache)
            with pytest.raises(InputError, match=r"filled by another model named .*: make a cache per model"):
                two.forward(tokens[:, 5:], past_kv_cache=cache)
            assert cache.length == 5
            one.forward(tokens[:, 5:], past_kv_cache=cache)


def test_a_cache_serves_the_same_file_opened_again(tiny_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    tokens = np.arange(1, 9)[None]
    one, two = HookedTransformer.from_onnx(tiny_folder, "cpu"), HookedTransformer.from_onnx(copy, "cpu", n_ctx=100)
    cache = KeyValueCache.init_cache(one.cfg)
    one.forward(tokens[:, :5], past_kv_cache=cache)
    close(two.forward(tokens[:, 5:], past_kv_cache=cache), one.forward(tokens)[:, 5:])


def test_something_else_is_no_cache(model: HookedTransformer, tokens: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"past_kv_cache must be graphlens's .*not a dict of builtins"):
        model.forward(tokens, past_kv_cache={})


def test_transformerlens_names_of_the_cache() -> None:
    assert graphlens.HookedTransformerKeyValueCache is graphlens.TransformerLensKeyValueCache is graphlens.KeyValueCache


# Keys that a cache does not have yet


def pieces(model: HookedTransformer, tokens: np.ndarray) -> np.ndarray:
    """The logits of tokens that go through a cache four at a time."""
    cache = KeyValueCache.init_cache(model.cfg, batch_size=len(tokens))
    parts = range(0, tokens.shape[1], 4)
    return np.concatenate([model.forward(tokens[:, at : at + 4], past_kv_cache=cache) for at in parts], 1)


@pytest.mark.parametrize(
    "edit",
    [
        Steer("blocks.1.attn.hook_pattern", 0.2),
        Patch("blocks.1.attn.hook_pattern", 0.3, heads=1),
    ],
    ids=str,
)
def test_an_edit_that_gives_queries_later_keys_warns_with_a_cache(
    edit: Intervention, model: HookedTransformer, tokens: np.ndarray
) -> None:
    with model.intervene([edit]):
        whole = model.forward(tokens)  # no cache, no warning
        with pytest.warns(
            UserWarning, match=f"'{edit.hook}' is the same for every key.*use_past_kv_cache=False"
        ) as told:
            found = pieces(model, tokens)
    assert len(told) == 1
    assert np.abs(found - whole).max() > 1e-3


@pytest.mark.parametrize(
    "edit",
    [
        Steer("blocks.1.attn.hook_attn_scores", 0.5),
        Patch("blocks.1.attn.hook_attn_scores", 0.5, positions=[1, 2]),
        Patch("blocks.1.attn.hook_pattern", 0.0, heads=1),
        Scale("blocks.1.attn.hook_pattern", 0.5),
        Ablate("blocks.1.attn.hook_pattern", heads=1),
        Patch("blocks.1.attn.hook_attn_scores", -np.inf, heads=0, allow_nonfinite=True),
    ],
    ids=str,
)
def test_one_that_leaves_later_keys_alone_is_the_same_with_a_cache(
    edit: Intervention, model: HookedTransformer, tokens: np.ndarray
) -> None:
    with model.intervene([edit]):
        close(pieces(model, tokens), model.forward(tokens))
