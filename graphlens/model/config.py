"""What a model says of itself: its configuration under TransformerLens's names, and its table of hook points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphlens.file.manifest import ModelConfig

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class HookedTransformerConfig(ModelConfig):
    """The model's configuration under TransformerLens's attribute names.

    It holds the architecture that the file states (see ModelConfig) and the choices made on opening the model.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        default_padding_side: ``"right"`` or ``"left"``: where prompts of different lengths are padded.
        tokenizer_prepends_bos: True if the tokenizer adds BOS by itself; None without a tokenizer.
        processing: The steps of weight processing that the file went through, in order.
        use_attn_result: True while there is ``attn.hook_result``.
        use_split_qkv_input: True while there are ``hook_q_input``, ``hook_k_input`` and ``hook_v_input``.
        use_attn_in: True while there is ``hook_attn_in``.
        use_hook_mlp_in: True while there is ``hook_mlp_in``.
        use_hook_tokens: True while there is ``hook_tokens``.
    """

    device: str
    default_padding_side: str
    tokenizer_prepends_bos: bool | None
    processing: tuple[str, ...]
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    use_hook_tokens: bool = False


class HookPointInfo(dict[str, tuple[str, str]]):
    """The hook points of a model: name -> (shape, dtype). ``rich.print`` shows it as a table."""

    title = "hook points"

    def __rich__(self) -> Table:
        from graphlens.views.tables import hook_table

        return hook_table(self, f"{len(self)} {self.title}")
