"""Models in memory whose class is one's own, or whose modules are: they open if their weights say what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from graphlens.errors import InputError
from graphlens.torch import HookedTransformer

CONFIG = transformers.GPT2Config(
    n_embd=15, n_layer=2, n_head=3, n_inner=21, vocab_size=37, n_positions=13, bos_token_id=0, eos_token_id=0
)
IDS = torch.arange(18).reshape(2, 9) % 37


class Renamed(transformers.GPT2LMHeadModel):
    """A class of one's own that computes what its family computes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the family's forward."""
        return super().forward(*args, **kwargs)


class Doubled(transformers.GPT2LMHeadModel):
    """One that computes something else from the same weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Twice the logits."""
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 2
        return found


class DoubledMlp(nn.Module):
    """A module in place of an MLP, over the same parameters."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act = mlp.c_fc, mlp.c_proj, mlp.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice what the MLP gives."""
        return 2 * self.c_proj(self.act(self.c_fc(x)))


def made(kind: type[transformers.GPT2LMHeadModel]) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    model = kind(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_a_class_of_ones_own_opens_as_its_family(training: bool) -> None:
    hf_model = made(Renamed)
    with torch.no_grad():
        theirs = hf_model(IDS).logits
    hf_model.train(training)
    ours = HookedTransformer.from_pretrained_no_processing("gpt2", hf_model=hf_model)
    assert (ours(IDS) - theirs).abs().max() < 5e-5 * max(1.0, float(theirs.abs().max()))
    assert ours.cfg.original_architecture == "GPT2LMHeadModel"
    assert hf_model.training is training


def with_mlp() -> transformers.GPT2LMHeadModel:
    model = made(transformers.GPT2LMHeadModel)
    model.transformer.h[1].mlp = DoubledMlp(model.transformer.h[1].mlp)
    return model


def with_activation() -> transformers.GPT2LMHeadModel:
    model = made(transformers.GPT2LMHeadModel)
    model.transformer.h[0].mlp.act = nn.ReLU()
    return model


def with_forward() -> transformers.GPT2LMHeadModel:
    model = made(transformers.GPT2LMHeadModel)
    usual = model.lm_head.forward
    model.lm_head.forward = lambda x: usual(x) * 2
    return model


def with_eps() -> transformers.GPT2LMHeadModel:
    model = made(transformers.GPT2LMHeadModel)
    model.transformer.h[0].ln_1.eps = 0.5
    return model


def with_rotation() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, vocab_size=37,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.model.rotary_emb.inv_freq *= 3  # which no checkpoint stores
    return model


@pytest.mark.parametrize(
    "make", [lambda: made(Doubled), with_mlp, with_activation, with_forward, with_eps, with_rotation]
)
def test_what_computes_something_else_than_its_weights_say_is_refused(
    make: Callable[[], transformers.PreTrainedModel],
) -> None:
    with pytest.raises(InputError, match="computes something else than its weights say"):
        HookedTransformer.from_pretrained_no_processing("mine", hf_model=make())


def test_a_hook_that_only_looks_is_no_reason_to_refuse() -> None:
    hf_model, seen = made(transformers.GPT2LMHeadModel), []
    hf_model.transformer.h[0].register_forward_hook(lambda *given: seen.append(1))
    ours = HookedTransformer.from_pretrained_no_processing("gpt2", hf_model=hf_model)
    with torch.no_grad():
        theirs = hf_model(IDS).logits
    assert (ours(IDS) - theirs).abs().max() < 5e-5 * max(1.0, float(theirs.abs().max()))
