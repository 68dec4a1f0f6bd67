"""Tiny random checkpoints of the families that foreign files are made of: odd sizes, no parameter at its initial symmetry.

Sizes are odd where tools allow it: ONNX Runtime's GroupQueryAttention wants heads of a multiple of 16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 211
LABELS = 7


@dataclass(frozen=True)
class Checkpoint:
    """A family's model.

    Attributes:
        model: transformers' class.
        config: Its config's class.
        kind: "decoder", "encoder" or "vision".
        arguments: What the config is made of.
        later: What config.json says besides, for older versions of transformers.
        family: Which family it is of.
        frozen: True for numbers of a generator that no version changes: of files that are committed.
    """

    model: str
    config: str
    kind: str
    arguments: Mapping[str, Any]
    later: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    frozen: bool = False


_WORDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LONG = _WORDS | {"max_position_embeddings": 64}
_GROUPED = _LONG | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
_FIVE = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 77}

CHECKPOINTS: dict[str, Checkpoint] = {
    "gpt2": Checkpoint(
        "GPT2LMHeadModel",
        "GPT2Config",
        "decoder",
        _WORDS | {"n_positions": 64, "n_embd": 40, "n_layer": 3, "n_head": 5, "n_inner": 77},
    ),
    "llama": Checkpoint(
        "LlamaForCausalLM",
        "LlamaConfig",
        "decoder",
        _GROUPED | {"num_hidden_layers": 3, "intermediate_size": 112, "tie_word_embeddings": False},
    ),
    "qwen3": Checkpoint(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        "decoder",
        _GROUPED | {"num_hidden_layers": 2, "intermediate_size": 112, "tie_word_embeddings": True},
    ),
    "neox": Checkpoint(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        "decoder",
        _LONG
        | {"hidden_size": 80, "num_attention_heads": 5, "intermediate_size": 77, "num_hidden_layers": 2}
        | {"rotary_pct": 0.25},
        {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    ),
    "gemma2": Checkpoint(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        "decoder",
        _GROUPED
        | {"num_hidden_layers": 2, "intermediate_size": 112, "sliding_window": 4, "query_pre_attn_scalar": 20}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "bert": Checkpoint(
        "BertForMaskedLM",
        "BertConfig",
        "encoder",
        {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_hidden_layers": 3, "type_vocab_size": 3} | _FIVE,
    ),
    "vit": Checkpoint(
        "ViTForImageClassification",
        "ViTConfig",
        "vision",
        {"image_size": 24, "patch_size": 8, "num_hidden_layers": 2, "num_labels": LABELS} | _FIVE,
    ),
}


FAMILIES = tuple(CHECKPOINTS)
_LITTLE = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
_LITTLE_VALUES = {
    "gpt2": {"n_layer": 2, "n_embd": 24, "n_head": 3, "n_inner": 40, "vocab_size": 61},
    "llama": _LITTLE | {"num_key_value_heads": 1, "vocab_size": 61},
    "qwen3": _LITTLE | {"num_key_value_heads": 1, "vocab_size": 61},
    "neox": _LITTLE | {"vocab_size": 61, "rotary_pct": 0.5},
    "gemma2": _LITTLE | {"num_key_value_heads": 1, "vocab_size": 61},
    "bert": _LITTLE | {"vocab_size": 61},
    "vit": _LITTLE,
}
# The same families smaller yet, for tests that run on every commit and for files that are committed.
CHECKPOINTS |= {
    f"small-{name}": replace(
        CHECKPOINTS[name],
        arguments={**CHECKPOINTS[name].arguments, **values},
        later={**CHECKPOINTS[name].later, **({"rotary_pct": 0.5} if name == "neox" else {})},
        family=name,
        frozen=True,
    )
    for name, values in _LITTLE_VALUES.items()
}


def family_of(name: str) -> str:
    """The family of a checkpoint."""
    return CHECKPOINTS[name].family or name


def make(name: str) -> Any:
    """transformers' model of a checkpoint, random, with every parameter far from 0 and from 1."""
    import torch
    import transformers

    checkpoint = CHECKPOINTS[name]
    config = getattr(transformers, checkpoint.config)(**checkpoint.arguments)
    torch.manual_seed(0)
    model = getattr(transformers, checkpoint.model)(config).eval()
    numbers = np.random.RandomState(0)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()) if checkpoint.frozen else model.named_parameters():
            width = 0.2 if parameter.ndim == 1 else 0.3 if checkpoint.frozen else 0.1
            if checkpoint.frozen:
                drawn = numbers.standard_normal(tuple(parameter.shape)).astype(np.float32)
                centre = 1.0 if parameter.ndim == 1 and key.endswith("weight") and name != "small-gemma2" else 0.0
                parameter.copy_(torch.from_numpy(np.atleast_1d(drawn) * np.float32(width) + np.float32(centre)))
            else:
                parameter.add_(torch.randn_like(parameter) * width)
    return model.requires_grad_(False)


def checkpoint_of(name: str, root: Path) -> Path:
    """The checkpoint folder of a family under ``root``, made where it is not there yet; with a tokenizer."""
    folder = root / f"{name}-checkpoint"
    if not (folder / "model.safetensors").exists():
        make(name).save_pretrained(folder)
        _say_later(folder / "config.json", CHECKPOINTS[name].later)
        if CHECKPOINTS[name].kind != "vision":
            _words(CHECKPOINTS[name].arguments["vocab_size"]).save_pretrained(folder)
    return folder


def load(folder: Path, attention: str = "eager", **changes: Any) -> Any:
    """transformers' model of a checkpoint folder made here, in float32; ``changes`` are fields of its config."""
    import torch
    import transformers

    architecture = json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True, **changes
    )
    return model.eval().requires_grad_(False)


def _say_later(path: Path, values: Mapping[str, Any]) -> None:
    """Adds fields to a config.json that an older transformers reads and transformers 5 no longer writes."""
    written = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**written, **values}, indent=2), "utf-8")


def _words(size: int) -> Any:
    """A tokenizer of as many words as there are tokens: tools that copy one want one."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0} | {f"w{number}": number for number in range(1, size)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<pad>")
