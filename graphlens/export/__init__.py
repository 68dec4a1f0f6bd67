"""How a transformers module becomes a graph: tracing, checkpoints, a file for each model family."""

from __future__ import annotations

from graphlens.export.families import Attention as Attention
from graphlens.export.families import ConfigReader as ConfigReader
from graphlens.export.families import Family as Family
from graphlens.export.families import Mlp as Mlp
from graphlens.export.families import Norms as Norms
from graphlens.export.families import Rotary as Rotary
from graphlens.export.families import Spec as Spec
from graphlens.export.families.family import register_family as register_family
from graphlens.export.families.parts import attention_of as attention_of
from graphlens.export.families.parts import llama_like as llama_like
