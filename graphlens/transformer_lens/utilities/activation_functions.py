"""``transformer_lens.utilities.activation_functions``: activation functions by their names."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.activations import SOFTCAP_DISABLED as SOFTCAP_DISABLED
from graphlens.lens.activations import SUPPORTED_ACTIVATIONS as SUPPORTED_ACTIVATIONS
from graphlens.lens.activations import XIELU as XIELU
from graphlens.lens.activations import ActivationFunction as ActivationFunction
from graphlens.lens.activations import apply_softcap as apply_softcap
from graphlens.lens.activations import gelu_fast as gelu_fast
from graphlens.lens.activations import gelu_new as gelu_new
from graphlens.lens.activations import gelu_pytorch_tanh as gelu_pytorch_tanh
from graphlens.lens.activations import relu2 as relu2
from graphlens.lens.activations import softcap_enabled as softcap_enabled
from graphlens.lens.activations import solu as solu
from graphlens.lens.activations import xielu as xielu

__getattr__ = refusing(__name__)
