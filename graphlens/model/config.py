"""What a model says of itself: its configuration under TransformerLens's names, and its table of hook points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from graphlens.file.manifest import ModelConfig
from graphlens.views.tables import hook_table


@dataclass(frozen=True)
class HookedTransformerConfig(ModelConfig):
    """The model's configuration under TransformerLens's attribute names: the file's architecture and this session's
    choices (``device`` is "cpu" or "cuda"; the ``use_`` flags say which flagged hook points there are)."""

    device: str
    default_prepend_bos: bool
    default_padding_side: str
    tokenizer_prepends_bos: bool | None
    processing: tuple[str, ...]
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    use_hook_tokens: bool = False

    attn_only = False
    gated_mlp = False
    parallel_attn_mlp = False
    attention_dir = "causal"

    @property
    def attn_scale(self) -> float:
        """sqrt(d_head): what attention scores are divided by, in a model that scales them."""
        return math.sqrt(self.d_head)


class HookPointInfo(dict[str, tuple[str, str]]):
    """Hook points of a model: name -> (shape, dtype). Printed by rich, it is a table."""

    title = "hook points"

    def __rich__(self) -> Any:
        return hook_table(self, f"{len(self)} {self.title}")
