"""BERT: an encoder with token types, whose norms come after each sublayer; logits of masked tokens."""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.official_names import official_names
from graphlens.export.families.spec import Attention, EncoderParts, Mlp, Norms, Spec

# What trains the pooler, which no masked-language model has.
POOLER = frozenset({
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type",
})  # fmt: skip
# Old checkpoints call a norm's weight and bias so.
NORMS = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}


def spec(c: ConfigReader, root: str = "bert", head: str = "cls.predictions") -> Spec:
    """What BERT computes.

    Args:
        c: The config.
        root: The path of the model without its head.
        head: The path of the masked-language head.
    """
    c.only("is_decoder", False)
    c.only("add_cross_attention", False)
    c.only("position_embedding_type", "absolute")
    n_heads, d_model, embeddings = c.size("num_attention_heads"), c.size("hidden_size"), f"{root}.embeddings"
    d_head = d_model // n_heads
    return Spec(
        n_layers=c.size("num_hidden_layers"),
        d_model=d_model,
        d_vocab=c.size("vocab_size"),
        n_ctx=c.size("max_position_embeddings"),
        norms=Norms("LN", c.number("layer_norm_eps")),
        attention=Attention(
            n_heads,
            n_heads,
            d_head,
            d_head**-0.5 if d_head else 1.0,
            module="attention",
            q="self.query",
            k="self.key",
            v="self.value",
            out="output.dense",
        ),
        mlp=Mlp(
            c.size("intermediate_size"), c.get("hidden_act"), module="", up="intermediate.dense", down="output.dense"
        ),
        blocks=f"{root}.encoder.layer",
        embed=f"{embeddings}.word_embeddings",
        pos_embed=f"{embeddings}.position_embeddings",
        embed_norm=f"{embeddings}.LayerNorm",
        ln1="attention.output.LayerNorm",
        ln2="output.LayerNorm",
        final_norm=f"{head}.transform.LayerNorm",
        head=f"{head}.decoder",
        encoder=EncoderParts(
            token_types=f"{embeddings}.token_type_embeddings",
            n_token_types=c.size("type_vocab_size"),
            dense=f"{head}.transform.dense",
            act=c.get("hidden_act"),
        ),
    )


def tied(root: str, head: str) -> dict[str, str]:
    """Parameters of the head -> those whose tensors they share."""
    return {
        f"{head}.decoder.weight": f"{root}.embeddings.word_embeddings.weight",
        f"{head}.decoder.bias": f"{head}.bias",
    }


BERT = register(
    Family(
        architecture="BertForMaskedLM",
        model_types=("bert",),
        spec=spec,
        prepends_bos=False,
        tied=tied("bert", "cls.predictions"),
        respelt=NORMS,
        without_effect=POOLER,
        aliases=official_names("BertForMaskedLM"),
    )
)
