"""TransformerLens 3.9's official names and aliases, and which of them graphlens does not resolve."""

from __future__ import annotations

import warnings

from graphlens.export.families import families, hub_name

# The beginning of official names of architectures that are not exported -> what they are.
OUT_OF_SCOPE = {
    "allenai/Olmo-3": "OLMo 3",
    "allenai/OLMoE": "OLMoE",
    "bigcode/santacoder": "code on the hub",
    "facebook/hubert": "speech",
    "facebook/wav2vec2": "speech",
    "google-t5/": "an encoder with a decoder",
    "google/gemma-3-4b": "images and text",
    "google/gemma-3-12b": "images and text",
    "google/gemma-3-27b": "images and text",
    "google/medgemma-4b": "images and text",
    "google/medgemma-27b-it": "images and text",
    "openai/gpt-oss": "gpt-oss",
    "Qwen/Qwen-": "code on the hub",
    "swiss-ai/Apertus": "Apertus",
}


def test_every_name_and_alias_of_transformerlens_resolves() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.loading_from_pretrained import get_official_model_name
        from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
    known = {name for family in families() for name in family.aliases.values()} | {
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
    }
    unused = set(OUT_OF_SCOPE)
    for official in OFFICIAL_MODEL_NAMES:
        reasons = {start for start in OUT_OF_SCOPE if official.startswith(start)}
        unused -= reasons
        assert (official in known) != bool(reasons), official
        for alias in MODEL_ALIASES.get(official, []) if official in known else ():
            # A few aliases stand at two models: TransformerLens takes the last.
            for spelled in (alias, alias.lower(), alias.upper()):
                assert hub_name(spelled) == get_official_model_name(alias), spelled
    assert not unused


def test_a_name_that_is_no_alias_stays_what_it_is() -> None:
    assert hub_name("someone/Pythia-70M") == "someone/Pythia-70M"
    assert hub_name("gpt2") == "gpt2"
