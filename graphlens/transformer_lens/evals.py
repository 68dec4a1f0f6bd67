"""``transformer_lens.evals``: rough evaluations of a model."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.evals import DATASET_LOADERS as DATASET_LOADERS
from graphlens.lens.evals import DATASET_NAMES as DATASET_NAMES
from graphlens.lens.evals import evaluate as evaluate
from graphlens.lens.evals import evaluate_on_dataset as evaluate_on_dataset
from graphlens.lens.evals import induction_loss as induction_loss
from graphlens.lens.evals import make_code_data_loader as make_code_data_loader
from graphlens.lens.evals import make_owt_data_loader as make_owt_data_loader
from graphlens.lens.evals import make_pile_data_loader as make_pile_data_loader
from graphlens.lens.evals import make_wiki_data_loader as make_wiki_data_loader
from graphlens.lens.evals import sanity_check as sanity_check
from graphlens.lens.ioi import IOIDataset as IOIDataset
from graphlens.lens.ioi import ioi_eval as ioi_eval
from graphlens.lens.mmlu import MMLU_ANSWER_LETTERS as MMLU_ANSWER_LETTERS
from graphlens.lens.mmlu import MMLU_SUBJECTS as MMLU_SUBJECTS
from graphlens.lens.mmlu import make_mmlu_data_loader as make_mmlu_data_loader
from graphlens.lens.mmlu import mmlu_eval as mmlu_eval

__getattr__ = refusing(__name__)
