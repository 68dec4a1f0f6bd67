"""``transformer_lens.utilities.hf_utils``: files and data sets of the Hugging Face hub."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.hub import call_hf_with_retry as call_hf_with_retry
from graphlens.lens.hub import clear_huggingface_cache as clear_huggingface_cache
from graphlens.lens.hub import download_file_from_hf as download_file_from_hf
from graphlens.lens.hub import get_dataset as get_dataset
from graphlens.lens.hub import get_hf_token as get_hf_token
from graphlens.lens.hub import get_rotary_pct_from_config as get_rotary_pct_from_config
from graphlens.lens.hub import keep_single_column as keep_single_column
from graphlens.lens.hub import select_compatible_kwargs as select_compatible_kwargs

__getattr__ = refusing(__name__)
