"""Two toy families with norms after attention and the MLP, as Gemma 2 and OLMo 2 have them, on GPT-2's other parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch_reference import ODD_CONFIG

import graphlens
from graphlens.export import families
from graphlens.export.families import Family, Tap
from graphlens.export.families.gpt2 import GPT2


class Normed(nn.Module):
    """A module whose output goes through a LayerNorm."""

    def __init__(self, inner: nn.Module, config: Any) -> None:
        super().__init__()
        self.inner, self.post = inner, nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, *args: Any, **options: Any) -> Any:
        out = self.inner(*args, **options)
        return (self.post(out[0]), *out[1:]) if isinstance(out, tuple) else self.post(out)


class SandwichConfig(transformers.GPT2Config):
    model_type = "sandwich"


class PostOnlyConfig(transformers.GPT2Config):
    model_type = "post-only"


class SandwichLMHeadModel(transformers.GPT2LMHeadModel):
    """Norms before and after each sublayer, as in Gemma 2."""

    config_class = SandwichConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for block in self.transformer.h:
            block.attn, block.mlp = Normed(block.attn, config), Normed(block.mlp, config)
            self.change(block)
        self.post_init()

    def change(self, block: Any) -> None:
        pass


class PostOnlyLMHeadModel(SandwichLMHeadModel):
    """Norms after each sublayer alone, as in OLMo 2: what they normalise is the sublayer's output."""

    config_class = PostOnlyConfig

    def change(self, block: Any) -> None:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()


def _moved(name: str) -> str:
    return name.replace(".attn.", ".attn.inner.").replace(".mlp.", ".mlp.inner.")


_WEIGHTS = {name: replace(weight, tensor=_moved(weight.tensor)) for name, weight in GPT2.block_weights.items()}
SANDWICH: Family = replace(
    GPT2,
    architecture="SandwichLMHeadModel",
    model_types=("sandwich",),
    aliases={},
    block={
        "": Tap(before="hook_resid_pre", after="hook_resid_post"),
        "attn": Tap(after="hook_attn_out"),
        "ln_2": Tap(before="hook_resid_mid"),
        "mlp.inner.c_fc": Tap(after="mlp.hook_pre"),
        "mlp.inner.c_proj": Tap(before="mlp.hook_post"),
        "mlp": Tap(after="hook_mlp_out"),
    },
    block_weights=_WEIGHTS,
)
POST_ONLY: Family = replace(
    SANDWICH,
    architecture="PostOnlyLMHeadModel",
    model_types=("post-only",),
    norms={"attn.post": "ln1", "mlp.post": "ln2"},
    block_weights={
        **_WEIGHTS,
        **{
            f"{norm}.{part}": replace(_WEIGHTS[f"{norm}.{part}"], tensor=f"transformer.h.{{i}}.{module}.post.{kind}")
            for norm, module in (("ln1", "attn"), ("ln2", "mlp"))
            for part, kind in (("w", "weight"), ("b", "bias"))
        },
    },
)


def register() -> None:
    """Makes both families known to graphlens and transformers, for the rest of the process."""
    for config, model, known in (
        (SandwichConfig, SandwichLMHeadModel, SANDWICH),
        (PostOnlyConfig, PostOnlyLMHeadModel, POST_ONLY),
    ):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config, model, exist_ok=True)
        if known not in families.families():
            families.register(known)


def exported(model_type: type[SandwichLMHeadModel], folder: Path) -> Path:
    """A random model of odd sizes, as a hooked folder."""
    torch.manual_seed(0)
    model = model_type(model_type.config_class(**ODD_CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "checkpoint")
    # The export's own checks call Python at every hook point in the order of TransformerLens's usual block, where a norm comes
    # before what it normalises here.
    return graphlens.export_model(
        folder / "checkpoint", folder / "hooked", verify=model_type is SandwichLMHeadModel
    ).folder
