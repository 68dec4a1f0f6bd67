"""``transformer_lens.HookedTransformer``: the model, with tensors."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.kinds import DTYPE_FROM_STRING as DTYPE_FROM_STRING
from graphlens.lens.kinds import Loss as Loss
from graphlens.lens.kinds import LossPerToken as LossPerToken
from graphlens.lens.kinds import SingleLoss as SingleLoss
from graphlens.model.request import Output as Output
from graphlens.torch import HookedTransformer as HookedTransformer

__getattr__ = refusing(__name__)
