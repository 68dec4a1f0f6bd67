"""How errors and warnings say what the longest input of a model is."""

from __future__ import annotations

from graphlens.file.manifest import ModelConfig


def longest(cfg: ModelConfig) -> str:
    """How many tokens a model takes, for people; also how to have it take more, where it was trained for more.

    Args:
        cfg: The model's config.
    """
    said, trained = f"{cfg.model_name} takes at most {cfg.n_ctx} (n_ctx)", cfg.n_ctx_trained
    if trained is None or trained <= cfg.n_ctx:
        return said
    if cfg.positional_embedding_type == "alibi":
        return f"{said}; it can take {trained}: open it with n_ctx="
    return f"{said}; it was trained for {trained}: open it with n_ctx="
