"""RoBERTa: BERT whose positions count the tokens that are no PAD, from the row after PAD's id, and whose head always has GELU."""

from __future__ import annotations

from dataclasses import replace

from graphlens.export.families import bert
from graphlens.export.families.config_reader import ConfigReader
from graphlens.export.families.family import Family, register
from graphlens.export.families.spec import Spec


def spec(c: ConfigReader) -> Spec:
    """What RoBERTa computes."""
    made = bert.spec(c, "roberta", "lm_head")
    assert made.encoder is not None
    padding = int(c.get("pad_token_id", 1))
    return replace(
        made,
        n_ctx=made.n_ctx - padding - 1,
        pos_offset=padding + 1,
        final_norm="lm_head.layer_norm",
        encoder=replace(made.encoder, dense="lm_head.dense", act="gelu", padding=padding),
    )


ROBERTA = register(
    Family(
        architecture="RobertaForMaskedLM",
        model_types=("roberta",),
        spec=spec,
        prepends_bos=False,
        tied=bert.tied("roberta", "lm_head"),
        respelt=bert.NORMS,
        aliases={name: f"FacebookAI/{name}" for name in ("roberta-base", "roberta-large")},
    )
)
