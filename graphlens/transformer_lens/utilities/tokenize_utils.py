"""``transformer_lens.utilities.tokenize_utils``: helpers around tokenizers."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.tokenizing import get_attention_mask as get_attention_mask
from graphlens.lens.tokenizing import get_input_with_manually_prepended_bos as get_input_with_manually_prepended_bos
from graphlens.lens.tokenizing import get_tokenizer_with_bos as get_tokenizer_with_bos
from graphlens.lens.tokenizing import get_tokens_with_bos_removed as get_tokens_with_bos_removed
from graphlens.lens.tokenizing import tokenize_and_concatenate as tokenize_and_concatenate

__getattr__ = refusing(__name__)
