"""``transformer_lens.utils``: TransformerLens's helpers, under their older name."""

from __future__ import annotations

from graphlens.analysis.slices import SliceInput as SliceInput
from graphlens.lens.absent import refusing
from graphlens.lens.activations import SOFTCAP_DISABLED as SOFTCAP_DISABLED
from graphlens.lens.activations import SUPPORTED_ACTIVATIONS as SUPPORTED_ACTIVATIONS
from graphlens.lens.activations import ActivationFunction as ActivationFunction
from graphlens.lens.activations import apply_softcap as apply_softcap
from graphlens.lens.activations import gelu_fast as gelu_fast
from graphlens.lens.activations import gelu_new as gelu_new
from graphlens.lens.activations import gelu_pytorch_tanh as gelu_pytorch_tanh
from graphlens.lens.activations import relu2 as relu2
from graphlens.lens.activations import softcap_enabled as softcap_enabled
from graphlens.lens.activations import solu as solu
from graphlens.lens.activations import xielu as xielu
from graphlens.lens.defaults import USE_DEFAULT_VALUE as USE_DEFAULT_VALUE
from graphlens.lens.defaults import LocallyOverridenDefaults as LocallyOverridenDefaults
from graphlens.lens.defaults import override_or_use_default_value as override_or_use_default_value
from graphlens.lens.devices import get_best_available_device as get_best_available_device
from graphlens.lens.devices import get_device as get_device
from graphlens.lens.devices import get_device_for_block_index as get_device_for_block_index
from graphlens.lens.devices import move_to_and_update_config as move_to_and_update_config
from graphlens.lens.devices import print_gpu_mem as print_gpu_mem
from graphlens.lens.devices import warn_if_mps as warn_if_mps
from graphlens.lens.hub import call_hf_with_retry as call_hf_with_retry
from graphlens.lens.hub import clear_huggingface_cache as clear_huggingface_cache
from graphlens.lens.hub import download_file_from_hf as download_file_from_hf
from graphlens.lens.hub import get_dataset as get_dataset
from graphlens.lens.hub import get_hf_token as get_hf_token
from graphlens.lens.hub import get_rotary_pct_from_config as get_rotary_pct_from_config
from graphlens.lens.hub import keep_single_column as keep_single_column
from graphlens.lens.hub import select_compatible_kwargs as select_compatible_kwargs
from graphlens.lens.initial import NonlinearityType as NonlinearityType
from graphlens.lens.initial import calc_fan_in_and_fan_out as calc_fan_in_and_fan_out
from graphlens.lens.initial import init_kaiming_normal_ as init_kaiming_normal_
from graphlens.lens.initial import init_kaiming_uniform_ as init_kaiming_uniform_
from graphlens.lens.initial import init_xavier_normal_ as init_xavier_normal_
from graphlens.lens.initial import init_xavier_uniform_ as init_xavier_uniform_
from graphlens.lens.kinds import ModelWithCfg as ModelWithCfg
from graphlens.lens.linear import TypedModuleList as TypedModuleList
from graphlens.lens.linear import temporarily_swap_parameter as temporarily_swap_parameter
from graphlens.lens.logits import lm_accuracy as lm_accuracy
from graphlens.lens.logits import lm_cross_entropy_loss as lm_cross_entropy_loss
from graphlens.lens.logits import logits_to_df as logits_to_df
from graphlens.lens.logits import sample_logits as sample_logits
from graphlens.lens.tensors import check_structure as check_structure
from graphlens.lens.tensors import filter_dict_by_prefix as filter_dict_by_prefix
from graphlens.lens.tensors import get_corner as get_corner
from graphlens.lens.tensors import get_cumsum_along_dim as get_cumsum_along_dim
from graphlens.lens.tensors import get_matrix_corner as get_matrix_corner
from graphlens.lens.tensors import get_nested_attr as get_nested_attr
from graphlens.lens.tensors import get_offset_position_ids as get_offset_position_ids
from graphlens.lens.tensors import is_library_available as is_library_available
from graphlens.lens.tensors import is_lower_triangular as is_lower_triangular
from graphlens.lens.tensors import is_square as is_square
from graphlens.lens.tensors import remove_batch_dim as remove_batch_dim
from graphlens.lens.tensors import repeat_along_head_dimension as repeat_along_head_dimension
from graphlens.lens.tensors import set_nested_attr as set_nested_attr
from graphlens.lens.tensors import to_numpy as to_numpy
from graphlens.lens.tensors import transpose as transpose
from graphlens.lens.tokenizing import get_attention_mask as get_attention_mask
from graphlens.lens.tokenizing import get_input_with_manually_prepended_bos as get_input_with_manually_prepended_bos
from graphlens.lens.tokenizing import get_tokenizer_with_bos as get_tokenizer_with_bos
from graphlens.lens.tokenizing import get_tokens_with_bos_removed as get_tokens_with_bos_removed
from graphlens.lens.tokenizing import tokenize_and_concatenate as tokenize_and_concatenate
from graphlens.utils import Slice as Slice
from graphlens.utils import composition_scores as composition_scores
from graphlens.utils import get_act_name as get_act_name
from graphlens.utils import test_prompt as test_prompt

__getattr__ = refusing(__name__)
