"""Families that are not in the matrix: tiny random models by torch's older exporter, adopted, beside transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graphlens
from graphlens.errors import GraphlensError, ModelFileError
from tests.adopt.torch_routes import quiet

VOCABULARY, LAYERS, HEADS, WIDTH = 211, 3, 5, 40
_WORDS = {"vocab_size": VOCABULARY}
_SIZES = _WORDS | {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
_BERT = _SIZES | {"intermediate_size": 77, "max_position_embeddings": 64}
_ROBERTA = _BERT | {"max_position_embeddings": 66}
_OPT = _SIZES | {"ffn_dim": 77, "max_position_embeddings": 64}
_RELATIVE = _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_EVEN = _BERT | {"num_attention_heads": 4, "intermediate_size": 80, "embedding_size": WIDTH}
_D_MODEL = _WORDS | {"d_model": WIDTH}


@dataclass(frozen=True)
class Other:
    """A family's model.

    Attributes:
        said: What the page calls it.
        model: transformers' class.
        config: Its config's class.
        arguments: What the config is made of.
        kind: "decoder" or "encoder": what graphlens opens it as.
        lacks: Hook points that it has not, of a block or outside of them.
        refused: What the sentence says that refuses it; "" for one that is adopted.
    """

    said: str
    model: str
    config: str
    arguments: Mapping[str, Any]
    kind: str = "encoder"
    lacks: tuple[str, ...] = ()
    refused: str = ""


_EMBEDDINGS = tuple(f"embed.hook_{name}" for name in ("embed", "pos_embed", "token_type_embed"))
_NARROW = (*_EMBEDDINGS, "embed.ln.hook_scale", "embed.ln.hook_normalized", "unembed.hook_in")
_NARROW += ("mlm_head.ln.hook_scale", "mlm_head.ln.hook_normalized")
OTHERS: dict[str, Other] = {
    "albert": Other("ALBERT", "AlbertForMaskedLM", "AlbertConfig", _BERT | {"embedding_size": 16}, lacks=_NARROW),
    "camembert": Other("CamemBERT", "CamembertForMaskedLM", "CamembertConfig", _ROBERTA),
    "data2vec": Other("data2vec (text)", "Data2VecTextForMaskedLM", "Data2VecTextConfig", _ROBERTA),
    "distilbert": Other(
        "DistilBERT",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        _WORDS | {"dim": WIDTH, "n_heads": HEADS, "hidden_dim": 77, "n_layers": LAYERS, "max_position_embeddings": 64},
    ),
    "electra": Other("ELECTRA", "ElectraForMaskedLM", "ElectraConfig", _BERT | {"embedding_size": 16}, lacks=_NARROW),
    "ernie": Other("ERNIE", "ErnieForMaskedLM", "ErnieConfig", _BERT),
    "esm": Other(
        "ESM-2 (rotary)",
        "EsmForMaskedLM",
        "EsmConfig",
        _BERT | {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 3},
    ),
    "eurobert": Other(
        "EuroBERT",
        "EuroBertForMaskedLM",
        "EuroBertConfig",
        _BERT | {"num_key_value_heads": 1, "pad_token_id": 0, "mask_token_id": 3, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "ibert": Other("I-BERT", "IBertForMaskedLM", "IBertConfig", _ROBERTA),
    "megatron": Other("MegatronBERT", "MegatronBertForMaskedLM", "MegatronBertConfig", _BERT),
    "modernbert": Other(
        "ModernBERT",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _BERT | {"pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 3},
    ),
    "mpnet": Other("MPNet", "MPNetForMaskedLM", "MPNetConfig", _ROBERTA),
    "nomic": Other("NomicBERT", "NomicBertForMaskedLM", "NomicBertConfig", _BERT),
    "rembert": Other(
        "RemBERT",
        "RemBertForMaskedLM",
        "RemBertConfig",
        _BERT | {"input_embedding_size": 16, "output_embedding_size": 24},
        lacks=_NARROW,
    ),
    "roformer": Other("RoFormer", "RoFormerForMaskedLM", "RoFormerConfig", _BERT | {"embedding_size": WIDTH}),
    "xlm-roberta": Other("XLM-RoBERTa", "XLMRobertaForMaskedLM", "XLMRobertaConfig", _ROBERTA),
    "xlm-roberta-xl": Other("XLM-RoBERTa XL", "XLMRobertaXLForMaskedLM", "XLMRobertaXLConfig", _ROBERTA),
    "biogpt": Other("BioGPT", "BioGptForCausalLM", "BioGptConfig", _BERT, "decoder"),
    "bloom": Other(
        "Bloom",
        "BloomForCausalLM",
        "BloomConfig",
        _WORDS | {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
        "decoder",
    ),
    "ctrl": Other(
        "CTRL",
        "CTRLLMHeadModel",
        "CTRLConfig",
        _WORDS | {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "dff": 77, "n_positions": 64},
        "decoder",
    ),
    "gpt": Other(
        "GPT",
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        _WORDS | {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 64},
        "decoder",
    ),
    "mpt": Other(
        "MPT",
        "MptForCausalLM",
        "MptConfig",
        _D_MODEL | {"n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 64},
        "decoder",
    ),
    "opt": Other("OPT", "OPTForCausalLM", "OPTConfig", _OPT | {"word_embed_proj_dim": WIDTH}, "decoder"),
    "opt-350m": Other(
        "OPT-350m",
        "OPTForCausalLM",
        "OPTConfig",
        _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "decoder",
        ("unembed.hook_in",),
    ),
    "xglm": Other(
        "XGLM",
        "XGLMForCausalLM",
        "XGLMConfig",
        _D_MODEL | {"attention_heads": HEADS, "num_layers": LAYERS, "ffn_dim": 77, "max_position_embeddings": 64},
        "decoder",
    ),
    "convbert": Other(
        "ConvBERT", "ConvBertForMaskedLM", "ConvBertConfig", _EVEN, refused="does not go through a projection"
    ),
    "deberta": Other("DeBERTa", "DebertaForMaskedLM", "DebertaConfig", _RELATIVE, refused="no attention"),
    "deberta-v2": Other("DeBERTa v2", "DebertaV2ForMaskedLM", "DebertaV2Config", _RELATIVE, refused="no attention"),
    "layoutlm": Other("LayoutLM", "LayoutLMForMaskedLM", "LayoutLMConfig", _BERT, refused="besides those of tokens"),
    "mobilebert": Other(
        "MobileBERT",
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        _BERT | {"embedding_size": 24, "true_hidden_size": WIDTH, "intra_bottleneck_size": WIDTH},
        refused="come from different activations",
    ),
    "xlm": Other(
        "XLM",
        "XLMWithLMHeadModel",
        "XLMConfig",
        _WORDS | {"emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_position_embeddings": 64},
        refused="are no chain",
    ),
    "xlnet": Other(
        "XLNet",
        "XLNetLMHeadModel",
        "XLNetConfig",
        _D_MODEL | {"n_layer": LAYERS, "n_head": HEADS, "d_inner": 77},
        refused="no attention",
    ),
}
INTRODUCTION = """Tiny random models through torch's older exporter, adopted: the largest difference of logits, residual streams
and patterns from transformers, as a share of the largest number there, and that of the logits with the residual stream before
block 1 moved. Prompts are padded on the right.
"""
ADOPTED = tuple(name for name, other in OTHERS.items() if not other.refused)
REFUSED = tuple(name for name, other in OTHERS.items() if other.refused)


@dataclass(frozen=True)
class Beside:
    """An adopted model beside transformers' own.

    Attributes:
        hooks: How many hook points were found.
        weights: How many weights.
        missing: Hook points that a model of its kind has and this one does not show.
        plain: The largest difference of logits, residual streams and patterns, of the largest number there.
        edited: The same of logits once the residual stream before block 1 was moved.
    """

    hooks: int
    weights: int
    missing: tuple[str, ...]
    plain: float
    edited: float


def make(name: str) -> Any:
    """transformers' model of a family, random, with every parameter far from 0 and from 1."""
    import transformers

    other = OTHERS[name]
    config = getattr(transformers, other.config)(**other.arguments)
    torch.manual_seed(0)
    model = getattr(transformers, other.model)(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embed_positions" not in key or name != "roformer":  # its sines are parameters
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    return model.requires_grad_(False)


class Called(torch.nn.Module):
    """A model called with tensors by place, which gives logits."""

    def __init__(self, model: Any, decoder: bool) -> None:
        super().__init__()
        self.model, self.options = model, {"use_cache": False} if decoder else {}

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=mask, **self.options).logits


def export(model: Any, target: Path, decoder: bool) -> None:
    """Exports a model with torch's older exporter."""
    names = ["input_ids", "attention_mask"]
    axes = {each: {0: "batch", 1: "sequence"} for each in (*names, "logits")}
    ids = torch.from_numpy(np.random.default_rng(1).integers(5, VOCABULARY, (2, 9)))
    with quiet():
        torch.onnx.export(
            Called(model, decoder).eval(), (ids, torch.ones_like(ids)), target, input_names=names,
            output_names=["logits"], dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip


def adopted(name: str, folder: Path) -> tuple[Any, graphlens.AdoptReport, Any]:
    """(transformers' model, what adopting its file found, the opened model)."""
    other, file = OTHERS[name], folder / f"{name}.onnx"
    model = make(name)
    export(model, file, other.kind == "decoder")
    report = graphlens.adopt(file, folder / name, announce=lambda _: None)
    kind = graphlens.HookedEncoder if other.kind == "encoder" else graphlens.HookedTransformer
    return model, report, kind.from_onnx(folder / name, "cpu")


def beside(name: str, folder: Path) -> Beside:
    """Adopts a family's file and compares it with transformers, on a batch with padding on the right."""
    model, report, ours = adopted(name, folder)
    random = np.random.default_rng(7)
    ids = random.integers(5, VOCABULARY, (3, 11))
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    real = mask != 0
    move = random.standard_normal(WIDTH).astype(np.float32)
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    right = model(**given, output_hidden_states=True, output_attentions=True)
    logits, cache = ours.run_with_cache(ids, attention_mask=mask)
    plain = _apart(logits[real], right.logits.numpy()[real])
    for layer in range(LAYERS):
        stream = _prompts_apart(right.hidden_states[layer].numpy(), ids.shape)
        plain = max(plain, _apart(cache[f"blocks.{layer}.hook_resid_pre"][real], stream[real]))
        pattern, expected = (
            each.transpose(0, 2, 1, 3)[real]
            for each in (cache[f"blocks.{layer}.attn.hook_pattern"], right.attentions[layer].numpy())
        )
        plain = max(plain, _apart(pattern, expected))

    def moved(value: Any, hook: Any) -> Any:
        return value + move

    edited = ours.run_with_hooks(ids, attention_mask=mask, fwd_hooks=[("blocks.1.hook_resid_pre", moved)])
    with _Moving(model, torch.from_numpy(move)):
        expected = model(**given).logits.numpy()
    assert np.abs(expected[real] - right.logits.numpy()[real]).max() > 1e-2, "the edit does nothing in transformers"
    return Beside(
        len(report.hooks),
        len(report.weights),
        tuple(hook for hook in report.adopted.missing if "hook_" in hook),
        plain,
        _apart(edited[real], expected[real]),
    )


def _prompts_apart(stream: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return stream.reshape(*shape, -1)


def _apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


class _Moving:
    """Adds a vector to what a model's second block is called with, inside the ``with`` block."""

    def __init__(self, model: Any, move: torch.Tensor) -> None:
        lists = [one for one in model.modules() if isinstance(one, torch.nn.ModuleList)]
        shared = next((one.albert_layers[0] for one in model.modules() if hasattr(one, "albert_layers")), None)
        self.block = shared or next(one for one in lists if len(one) == LAYERS)[1]
        self.at, self.calls, self.move = 1 if shared is not None else 0, 0, move

    def __enter__(self) -> None:
        self.handle = self.block.register_forward_pre_hook(self.called, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def called(self, block: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.calls += 1
        if self.calls - 1 != self.at:
            return None
        if args:
            return (args[0] + self.move, *args[1:]), options
        return args, options | {"hidden_states": options["hidden_states"] + self.move}


def refusal(name: str, folder: Path) -> str:
    """The sentence that refuses a family's file."""
    file = folder / f"{name}.onnx"
    export(make(name), file, False)
    try:
        graphlens.adopt(file, dry_run=True, announce=lambda _: None)
    except ModelFileError as error:
        return str(error)
    return ""


def section(folder: Path) -> list[str]:
    """The part of the page about these families, in Markdown."""
    lines = [
        INTRODUCTION,
        "| family | opens as | hook points | weights | largest difference | with an edit |",
        "|---|---|---|---|---|---|",
    ]
    for name in ADOPTED:
        other, kind = OTHERS[name], "HookedEncoder" if OTHERS[name].kind == "encoder" else "HookedTransformer"
        try:
            found = beside(name, folder)
        except (GraphlensError, AssertionError) as error:
            lines.append(f"| {other.said} | **{type(error).__name__}** | | | | |")
            continue
        lines.append(
            f"| {other.said} | {kind} | {found.hooks} | {found.weights} | {found.plain:.0e} | {found.edited:.0e} |"
        )
    sentences = [f"- {OTHERS[name].said}: {refusal(name, folder).partition(': ')[2]}" for name in REFUSED]
    return [*lines, "", "Refused, by these sentences:", "", *sentences]
