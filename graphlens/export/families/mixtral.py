"""Mixtral: Mistral's decoder, whose MLP is a choice of experts for each token."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.parts import llama_like
from graphlens.export.families.spec import Experts, Mlp, Spec


def spec(c: ConfigReader) -> Spec:
    """What Mixtral computes."""
    c.only("layer_types", None)  # transformers ignores them: every layer has the window
    mlp = Mlp(
        c.size("intermediate_size"),
        c.get("hidden_act"),
        module="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
        experts=Experts(c.size("num_local_experts"), c.size("num_experts_per_tok")),
    )
    return llama_like(c, windows=True, mlp=mlp)


MIXTRAL = register(
    Family(
        architecture="MixtralForCausalLM",
        model_types=("mixtral",),
        spec=spec,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        prefixes=("model.",),
        # What training reads alone.
        without_effect=frozenset(
            {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "num_experts"}
        ),
        aliases=official_names("MixtralForCausalLM"),
    )
)
