"""The manifest: its bytes stay, files written before a field of the config existed open, and constants are kept."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from graphlens import HookedTransformer, surgery
from graphlens.errors import ModelFileError
from graphlens.file.manifest import METADATA_KEY, Manifest, ModelConfig
from graphlens.surgery.graph import write_manifest

# What every manifest's config holds, in order; nothing may be added for GPT-2.
FIELDS = [
    "model_name", "original_architecture", "n_layers", "n_heads", "n_key_value_heads", "d_model", "d_head", "d_mlp",
    "d_vocab", "n_ctx", "act_fn", "eps", "normalization_type", "positional_embedding_type", "dtype",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tiny_folder: Path) -> str:
    """The manifest of the embedded file, which was written before the config held an architecture's constants."""
    return surgery.load(tiny_folder).metadata_props[METADATA_KEY]


def test_a_manifest_is_written_as_it_was_read(text: str) -> None:
    assert Manifest.from_json(text).to_json() == text
    assert list(json.loads(text)["config"]) == FIELDS


def test_a_file_without_the_constants_opens_with_gpt2s(text: str) -> None:
    config = Manifest.from_json(text).config
    constants = (config.attn_only, config.gated_mlp, config.parallel_attn_mlp, config.attention_dir)
    assert constants == (False, False, False, "causal")
    assert config.default_prepend_bos
    assert (config.d_vocab_out, config.attn_scale) == (config.d_vocab, math.sqrt(config.d_head))


def test_other_constants_are_stored_and_read_back(text: str) -> None:
    manifest = Manifest.from_json(text)
    other = replace(
        manifest.config, gated_mlp=True, attention_dir="bidirectional", default_prepend_bos=False,
    )  # fmt: skip
    written = replace(manifest, config=other).to_json()
    stored = json.loads(written)["config"]
    assert list(stored) == [
        *FIELDS, "gated_mlp", "attention_dir", "default_prepend_bos"
    ]  # fmt: skip
    assert Manifest.from_json(written).config == other


@pytest.mark.parametrize(("field", "value"), [("gated_mlp", 1), ("attention_dir", None), ("attn_only", "no")])
def test_a_constant_of_a_wrong_type_is_refused(field: str, value: object, text: str) -> None:
    data = json.loads(text)
    data["config"][field] = value
    with pytest.raises(ModelFileError, match=f"malformed.*{field}"):
        Manifest.from_json(json.dumps(data))


def test_parameters_are_counted_as_the_architecture_has_them(text: str) -> None:
    config = Manifest.from_json(text).config
    attention = 4 * config.d_model * config.n_heads * config.d_head * config.n_layers
    neurons = config.d_model * config.d_mlp * config.n_layers
    assert config.n_params == attention + 2 * neurons
    assert replace(config, gated_mlp=True).n_params == attention + 3 * neurons
    assert replace(config, attn_only=True).n_params == attention
    assert ModelConfig(**asdict(config)) == config


def test_whether_bos_is_prepended_is_the_files(tiny_folder: Path, tmp_path: Path) -> None:
    model = surgery.load(tiny_folder)
    manifest = surgery.read_manifest(model)
    write_manifest(model, replace(manifest, config=replace(manifest.config, default_prepend_bos=False)))
    surgery.save(model, tmp_path / "model")
    opened = HookedTransformer.from_onnx(
        tmp_path / "model", "cpu", tokenizer=HookedTransformer.from_onnx(tiny_folder).tokenizer
    )
    usual = HookedTransformer.from_onnx(tmp_path / "model", "cpu", default_prepend_bos=True, tokenizer=opened.tokenizer)
    assert (opened.cfg.default_prepend_bos, usual.cfg.default_prepend_bos) == (False, True)
    assert opened.to_tokens("When John").shape[1] == usual.to_tokens("When John").shape[1] - 1
