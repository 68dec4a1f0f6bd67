"""Tiny random encoders, their exports, and TransformerLens 3.9's HookedEncoder of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock

import graphlens
from tests.families.comparing import SHAPES, Difference, edit_of, padding, prompt, read, relative

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformer_lens
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.bert import convert_bert_weights

ENCODERS = ("bert", "roberta")
PAD = {"bert": 0, "roberta": 1}
TYPES = 3
_SIZES = {"vocab_size": 101, "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5}
_SIZES |= {"intermediate_size": 77, "type_vocab_size": TYPES}
_WORDS = "the a cat dog bird sat ran flew on over mat tree and saw it was red big"


def config_of(name: str, **changes: Any) -> Any:
    """transformers' config of an encoder; 64 positions are there for its tokens."""
    if name == "bert":
        return transformers.BertConfig(**{**_SIZES, "max_position_embeddings": 64, **changes})
    return transformers.RobertaConfig(**{**_SIZES, "max_position_embeddings": 66, **changes})


def made(name: str) -> Any:
    """transformers' model of an encoder, random, with every parameter far from 0 and from 1."""
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(config_of(name), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    return model.requires_grad_(False)


def word_pieces() -> Any:
    """A tokenizer like BERT's, of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: i for i, word in enumerate([*special, *_WORDS.split(), "##s", "."])}
    fast = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.add_special_tokens(special)
    ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    fast.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{role}_token": token for role, token in roles.items()},
    )


def checkpoint_of(name: str, root: Path) -> Path:
    """The checkpoint folder of an encoder under ``root``; BERT's has a tokenizer."""
    folder = root / f"{name}-checkpoint"
    with FileLock(root / f".{name}-checkpoint.lock"):
        if not (folder / "model.safetensors").exists():
            if name == "bert":
                word_pieces().save_pretrained(folder)
            made(name).save_pretrained(folder)
    return folder


def hooked_of(name: str, root: Path) -> Path:
    """Its hooked folder, verified as every export is."""
    folder, checkpoint = root / name, checkpoint_of(name, root)
    with FileLock(root / f".{name}.lock"):
        if not (folder / "model.onnx").exists():
            graphlens.export_model(checkpoint, folder, announce=lambda _: None)
    return folder


def reference_of(name: str, root: Path) -> Any:
    """transformers' model of its checkpoint."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        checkpoint_of(name, root), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval().requires_grad_(False)


def lens_of(model: Any) -> Any:
    """An encoder as TransformerLens has it. RoBERTa's is right where no token is PAD."""
    config = model.config
    fields = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_ctx": 64,
        "d_head": config.hidden_size // config.num_attention_heads,
        "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "d_vocab": config.vocab_size,
        "act_fn": "gelu",
        "eps": config.layer_norm_eps,
        "attention_dir": "bidirectional",
        "normalization_type": "LN",
        "init_weights": False,
        "device": "cpu",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens_config = HookedTransformerConfig(**fields)
        lens = transformer_lens.HookedEncoder(lens_config, move_to_device=False)
    state = convert_bert_weights(_as_bert(model), lens_config)
    state = {name: value for name, value in state.items() if not name.startswith(("pooler.", "nsp_head."))}
    state["embed.pos_embed.W_pos"] = state["embed.pos_embed.W_pos"][-64:]
    lens.embed.token_type_embed.W_token_type = torch.nn.Parameter(torch.empty(TYPES, config.hidden_size))
    lens.load_state_dict(state, strict=False)
    return lens.eval().requires_grad_(False)


def _as_bert(model: Any) -> Any:
    """The modules of an encoder where BERT has them, and a pooler and a second head, which nothing here reads."""
    nowhere = SimpleNamespace(weight=torch.zeros(2, 2), bias=torch.zeros(2))
    pooler = SimpleNamespace(dense=nowhere)
    if hasattr(model, "bert"):
        body, head = model.bert, model.cls.predictions
    else:
        body = model.roberta
        transform = SimpleNamespace(dense=model.lm_head.dense, LayerNorm=model.lm_head.layer_norm)
        head = SimpleNamespace(transform=transform, decoder=model.lm_head.decoder)
    root = SimpleNamespace(embeddings=body.embeddings, encoder=body.encoder, pooler=pooler)
    return SimpleNamespace(bert=root, cls=SimpleNamespace(predictions=head, seq_relationship=nowhere))


def inputs(side: str = "right") -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(tokens of which none is PAD, their types and which of them are real)."""
    real = padding(side)
    types = np.random.default_rng(1).integers(0, TYPES, real.shape)
    return prompt(101, *real.shape) % 99 + 2, {"token_type_ids": types, "one_zero_attention_mask": real}


def tensors(options: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in options.items()}


def transformers_logits(model: Any, tokens: np.ndarray, options: dict[str, np.ndarray]) -> np.ndarray:
    types, mask = (options.get(name) for name in ("token_type_ids", "one_zero_attention_mask"))
    given = {"token_type_ids": types, "attention_mask": mask}
    known = {name: torch.from_numpy(array) for name, array in given.items() if array is not None}
    return np.asarray(model(torch.from_numpy(tokens), **known).logits)


def against_transformers(name: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    """The logits of every input."""
    cases: list[tuple[str, np.ndarray, dict[str, np.ndarray]]] = [
        (f"{shape}", prompt(101, *shape) % 99 + 2, {}) for shape in SHAPES
    ]
    for side in ("left", "right"):
        tokens, options = inputs(side)
        real = options["one_zero_attention_mask"]
        # With PADs where the padding is, which RoBERTa's positions leave out, and with other tokens there.
        cases += [(side, tokens, options), (f"{side}, PAD", np.where(real == 1, tokens, PAD[name]), options)]
    for what, tokens, options in cases:
        expected = transformers_logits(theirs, tokens, options)
        yield Difference(f"logits {what}", relative(ours(tokens, **options), expected, what))


def against_torch_hooks(name: str, ours: Any, model: Any, side: str = "left") -> Iterator[Difference]:
    """The embeddings, and of each block what attention adds and what leaves it, beside transformers with torch hooks."""
    tokens, options = inputs(side)
    tokens[padding(side) == 0] = PAD[name]
    tokens[0, 4] = PAD[name]  # inside a text too
    kept: dict[str, torch.Tensor] = {}
    body = getattr(model, name)
    places = {
        "embed.hook_pos_embed": body.embeddings.position_embeddings,
        "hook_full_embed": body.embeddings,
    }
    for layer, block in enumerate(body.encoder.layer):
        places[f"blocks.{layer}.hook_normalized_resid_post"] = block
        places[f"blocks.{layer}.hook_attn_out"] = block.attention.output.dense

    def keep(place: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            kept[place] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(place)) for place, module in places.items()]
    transformers_logits(model, tokens, options)
    for handle in handles:
        handle.remove()
    _, cache = ours.run_with_cache(tokens, **options)
    for place, value in kept.items():
        found = cache[place]
        yield Difference(place, relative(found, np.broadcast_to(value.numpy(), found.shape), place))


def against_lens(ours: Any, lens: Any) -> Iterator[Difference]:
    """The logits, and every hook point, read and edited, beside TransformerLens's."""
    tokens, options = inputs("left")
    logits, cache = ours.run_with_cache(tokens, **options)
    expected, lens_cache = lens.run_with_cache(torch.from_numpy(tokens), **tensors(options))
    yield Difference("logits", relative(logits, expected, "logits"))
    assert list(cache) == list(lens_cache) == list(ours.hook_points())
    yield from read(cache, {hook: value.numpy() for hook, value in lens_cache.items()})
    for hook in lens_cache:
        yield Difference(f"an edit at {hook}", edited(ours, lens, hook, tokens, options))


def edited(ours: Any, lens: Any, name: str, tokens: np.ndarray, options: dict[str, np.ndarray]) -> float:
    """How far our logits are from TransformerLens's, with the same edit at a hook point."""

    def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.from_numpy(edit_of(name, activation.numpy()))

    found = ours.run_with_hooks(tokens, fwd_hooks=[(name, lambda array, hook: edit_of(name, array))], **options)
    expected = lens.run_with_hooks(torch.from_numpy(tokens), fwd_hooks=[(name, edit)], **tensors(options))
    return relative(found, expected, name)
