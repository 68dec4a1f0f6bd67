"""The parity matrix: every hook point of a model read and edited, beside TransformerLens 3.9. Shared by the test and by
``tools/parity_table.py``."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from lens_oracle import PROCESSING, oracle
from torch_reference import ODD_CONFIG
from transformer_lens.hook_points import HookPoint

import graphlens

TOLERANCE = 5e-5
MODELS: dict[str, dict[str, Any]] = {
    "tiny-gpt2": {},
    "odd, gelu_new": ODD_CONFIG,
    "odd, relu": {**ODD_CONFIG, "activation_function": "relu"},
    "odd, attention scaled by layer": {**ODD_CONFIG, "scale_attn_by_inverse_layer_idx": True},
    "1 layer, 1 head": {**ODD_CONFIG, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_inner": None},
}
FLAG_SETS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "results, mlp_in, tokens": ("use_attn_result", "use_hook_mlp_in", "use_hook_tokens"),
    "split inputs": ("use_split_qkv_input",),
    "attn_in": ("use_attn_in",),
}


@dataclass(frozen=True)
class Difference:
    """The largest difference of one hook point, as a share of max(1, max|reference|)."""

    hook: str
    read: float
    edited: float


def relative(found: np.ndarray, reference: np.ndarray, what: str) -> float:
    """max|found - reference| / max(1, max|reference|); -inf must stand at the same places."""
    assert found.shape == reference.shape, f"{what}: {found.shape} instead of {reference.shape}"
    masked = np.isneginf(reference)
    assert np.array_equal(np.isneginf(found), masked), f"{what}: other entries are masked"
    if masked.all():
        return 0.0
    kept = reference[~masked].astype(np.float64)
    return float(np.abs(found[~masked] - kept).max() / max(1.0, np.abs(kept).max()))


def edit_of(name: str, array: np.ndarray, vocabulary: int) -> np.ndarray:
    """A change that is different at every element, the same for both libraries."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if array.dtype.kind == "i":
        return (array + rng.integers(1, vocabulary, array.shape)) % vocabulary
    if "hook_scale" in name:  # stays positive
        return array * (1 + 0.5 * rng.random(array.shape)).astype(array.dtype)
    return array * array.dtype.type(0.5) + rng.standard_normal(array.shape).astype(array.dtype)


def save_random(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A GPT-2 with every weight far from its initial symmetry."""
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)


@dataclass
class Pair:
    """One model in both libraries."""

    ours: Any
    lens: Any

    def set_flags(self, flags: tuple[str, ...]) -> None:
        for flag in ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"):
            getattr(self.ours, f"set_{flag}")(False)
            getattr(self.lens, f"set_{flag}")(False)
        for flag in flags:
            if flag != "use_hook_tokens":
                getattr(self.ours, f"set_{flag}")(True)
                getattr(self.lens, f"set_{flag}")(True)
        self.ours.set_use_hook_tokens("use_hook_tokens" in flags)
        self.lens.cfg.use_hook_tokens = "use_hook_tokens" in flags
        if self.lens.cfg.use_hook_tokens and not hasattr(self.lens, "hook_tokens"):
            self.lens.hook_tokens = HookPoint()
            self.lens.setup()

    def differences(
        self, tokens: np.ndarray, edit: bool = True, mask: np.ndarray | None = None
    ) -> Iterator[Difference]:
        """Every hook point of a run, read and (where asked) edited; first the logits, as ``logits``."""
        ids = torch.from_numpy(tokens)
        attention = {} if mask is None else {"attention_mask": torch.from_numpy(mask)}
        logits, cache = self.ours.run_with_cache(tokens, **({} if mask is None else {"attention_mask": mask}))
        lens_logits, lens_cache = self.lens.run_with_cache(ids, **attention)
        assert list(cache) == list(lens_cache), "hook points, or their order, differ"
        yield Difference("logits", relative(logits, lens_logits.numpy(), "logits"), 0.0)
        for name, value in lens_cache.items():
            edited = self._edited(name, tokens, ids, mask) if edit else 0.0
            yield Difference(name, relative(cache[name], value.numpy(), name), edited)

    def _edited(self, name: str, tokens: np.ndarray, ids: torch.Tensor, mask: np.ndarray | None) -> float:
        vocabulary = self.ours.cfg.d_vocab
        attention = {} if mask is None else {"attention_mask": mask}
        lens_attention = {} if mask is None else {"attention_mask": torch.from_numpy(mask)}

        def ours(activation: np.ndarray, hook: Any) -> np.ndarray:
            return edit_of(name, activation, vocabulary)

        def theirs(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            return torch.from_numpy(edit_of(name, activation.numpy(), vocabulary))

        found = self.ours.run_with_hooks(tokens, fwd_hooks=[(name, ours)], **attention)
        reference = self.lens.run_with_hooks(ids, fwd_hooks=[(name, theirs)], **lens_attention)
        return relative(found, reference.numpy(), f"an edit at {name}")


def pair(model: str, processed: bool, work: Path) -> Pair:
    """The model of a row of ``MODELS`` in both libraries; checkpoints and exports go to ``work``."""
    if model == "tiny-gpt2":
        folder = graphlens.embedded_model()
    else:
        folder = work / "".join(c if c.isalnum() else "-" for c in model)
        if not folder.exists():
            save_random(folder, MODELS[model])
    make = graphlens.HookedTransformer
    opened = make.from_pretrained(folder) if processed else make.from_pretrained_no_processing(folder)
    return Pair(opened, oracle(folder, **dict.fromkeys(PROCESSING, processed)))


remembered_pair = functools.lru_cache(maxsize=None)(pair)


def prompt(pair_: Pair, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens [batch, length]."""
    return np.random.default_rng(seed).integers(0, pair_.ours.cfg.d_vocab, (batch, length))
