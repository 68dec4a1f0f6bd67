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
from graphlens.export import ConfigReader, Spec, register_family
from graphlens.export.families import families
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


def _sandwich(c: ConfigReader) -> Spec:
    spec = GPT2.spec(c)
    return replace(
        spec,
        attention=replace(spec.attention, module="attn.inner"),
        mlp=replace(spec.mlp, module="mlp.inner"),
        ln1_post="attn.post",
        ln2_post="mlp.post",
    )


def _post_only(c: ConfigReader) -> Spec:
    return replace(_sandwich(c), ln1="attn.post", ln2="mlp.post", ln1_post=None, ln2_post=None, post_norm_only=True)


SANDWICH = replace(GPT2, architecture="SandwichLMHeadModel", model_types=("sandwich",), aliases={}, spec=_sandwich)
POST_ONLY = replace(GPT2, architecture="PostOnlyLMHeadModel", model_types=("post-only",), aliases={}, spec=_post_only)


def register() -> None:
    """Makes both families known to graphlens and transformers, for the rest of the process."""
    for config, model, known in (
        (SandwichConfig, SandwichLMHeadModel, SANDWICH),
        (PostOnlyConfig, PostOnlyLMHeadModel, POST_ONLY),
    ):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config, model, exist_ok=True)
        if known not in families():
            register_family(known)


def exported(model_type: type[SandwichLMHeadModel], folder: Path) -> Path:
    """A random model of odd sizes, as a hooked folder."""
    torch.manual_seed(0)
    model = model_type(model_type.config_class(**ODD_CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "checkpoint")
    return graphlens.export_model(folder / "checkpoint", folder / "hooked").folder
