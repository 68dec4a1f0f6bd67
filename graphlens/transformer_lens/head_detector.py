"""``transformer_lens.head_detector``: heads by what they attend to."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.kinds import ErrorMeasure as ErrorMeasure
from graphlens.lens.kinds import HeadName as HeadName
from graphlens.lens.kinds import LayerHeadTuple as LayerHeadTuple
from graphlens.lens.kinds import LayerToHead as LayerToHead
from graphlens.utils import detect_head as detect_head

__getattr__ = refusing(__name__)
