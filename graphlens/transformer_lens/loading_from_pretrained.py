"""``transformer_lens.loading_from_pretrained``: what there is to load."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.pretrained import DEFAULT_MODEL_ALIASES as DEFAULT_MODEL_ALIASES
from graphlens.lens.pretrained import MODEL_ALIASES as MODEL_ALIASES
from graphlens.lens.pretrained import NON_HF_HOSTED_MODEL_NAMES as NON_HF_HOSTED_MODEL_NAMES
from graphlens.lens.pretrained import OFFICIAL_MODEL_NAMES as OFFICIAL_MODEL_NAMES
from graphlens.lens.pretrained import PYTHIA_CHECKPOINTS as PYTHIA_CHECKPOINTS
from graphlens.lens.pretrained import PYTHIA_V0_CHECKPOINTS as PYTHIA_V0_CHECKPOINTS
from graphlens.lens.pretrained import STANFORD_CRFM_CHECKPOINTS as STANFORD_CRFM_CHECKPOINTS
from graphlens.lens.pretrained import get_checkpoint_labels as get_checkpoint_labels
from graphlens.lens.pretrained import get_official_model_name as get_official_model_name
from graphlens.lens.pretrained import make_model_alias_map as make_model_alias_map
from graphlens.lens.pretrained_config import Config as Config
from graphlens.lens.pretrained_config import get_basic_config as get_basic_config
from graphlens.lens.pretrained_config import get_num_params_of_pretrained as get_num_params_of_pretrained
from graphlens.lens.pretrained_config import get_pretrained_model_config as get_pretrained_model_config

__getattr__ = refusing(__name__)
