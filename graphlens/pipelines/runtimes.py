"""What onnxruntime-genai and transformers.js want to find in a folder beside the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.file.copies import ensure_room
from graphlens.file.folder import CONFIG_FILE, GENERATION_CONFIG_FILE, MODEL_FILE
from graphlens.file.io_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    KEY_AND_VALUE,
    LOGITS,
    POSITION_IDS,
    past_input,
    present_output,
)
from graphlens.file.manifest import Json, Manifest
from graphlens.file.settings import read_settings

if TYPE_CHECKING:
    import onnx_ir as ir

EMBEDDABLE = 2_000_000_000  # bytes of weights that go into the graph's own file: a protobuf holds no more than 2 GiB


def write_genai_config(manifest: Manifest, stage: Path) -> None:
    """Writes ``genai_config.json``: onnxruntime-genai's description of a decoder with split past and present.

    Args:
        manifest: That of the model.
        stage: The folder, which holds the checkpoint's settings already.
    """
    config = manifest.config
    # The keys in a KV cache are rotated. In an input longer than rotary_short they would be rotated by other frequencies.
    length = config.rotary_short or config.n_ctx_trained or config.n_ctx
    hf = read_settings(stage / CONFIG_FILE) | read_settings(stage / GENERATION_CONFIG_FILE)
    eos = hf.get("eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) else eos
    tokens = {"bos_token_id": hf.get("bos_token_id", first_eos), "eos_token_id": eos}
    pad = hf.get("pad_token_id")
    tokens["pad_token_id"] = first_eos if pad is None else pad
    decoder: dict[str, Json] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": config.d_head,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_key_value_heads,
        "num_hidden_layers": config.n_layers,
        "inputs": {
            **{name: name for name in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)},
            **{f"past_{part}_names": past_input("%d", part) for part in KEY_AND_VALUE},
        },
        "outputs": {
            LOGITS: LOGITS,
            **{f"present_{part}_names": present_output("%d", part) for part in KEY_AND_VALUE},
        },
    }
    data: dict[str, Json] = {
        "model": {
            **{name: token for name, token in tokens.items() if token is not None},
            "context_length": length,
            "vocab_size": config.d_vocab,
            "type": "decoder",
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }
    _write_json(stage / "genai_config.json", data)


def write_transformersjs(model: ir.Model, stage: Path) -> None:
    """Writes ``onnx/model.onnx``, where transformers.js looks for it, and adds what it reads to ``config.json``.

    Args:
        model: The graph, in place: its weights are read into it.
        stage: The folder, which holds the checkpoint's settings already.
    """
    import onnx_ir as ir

    from graphlens.surgery.files import mapped

    folder = stage / "onnx"
    folder.mkdir()
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = mapped(value.const_value)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ensure_room(stage, size)
    embed = size < EMBEDDABLE
    ir.save(model, folder / MODEL_FILE, external_data=None if embed else f"{MODEL_FILE}_data")
    settings = read_settings(stage / CONFIG_FILE)
    settings["transformers.js_config"] = {"dtype": "fp32", **({} if embed else {"use_external_data_format": True})}
    _write_json(stage / CONFIG_FILE, settings)


def _write_json(path: Path, data: Mapping[str, Json]) -> None:
    """Writes JSON as people read it."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
