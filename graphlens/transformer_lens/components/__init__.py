"""``transformer_lens.components``: what the parts of a model are; none is made by itself."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.components import MLP as MLP
from graphlens.lens.components import AbstractAttention as AbstractAttention
from graphlens.lens.components import Attention as Attention
from graphlens.lens.components import BertBlock as BertBlock
from graphlens.lens.components import BertEmbed as BertEmbed
from graphlens.lens.components import BertMLMHead as BertMLMHead
from graphlens.lens.components import Embed as Embed
from graphlens.lens.components import GatedMLP as GatedMLP
from graphlens.lens.components import GroupedQueryAttention as GroupedQueryAttention
from graphlens.lens.components import LayerNorm as LayerNorm
from graphlens.lens.components import LayerNormPre as LayerNormPre
from graphlens.lens.components import MoE as MoE
from graphlens.lens.components import PosEmbed as PosEmbed
from graphlens.lens.components import RMSNorm as RMSNorm
from graphlens.lens.components import RMSNormPre as RMSNormPre
from graphlens.lens.components import TransformerBlock as TransformerBlock
from graphlens.lens.components import Unembed as Unembed

__getattr__ = refusing(__name__)
