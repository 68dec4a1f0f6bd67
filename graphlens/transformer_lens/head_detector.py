"""``transformer_lens.head_detector``: heads by what they attend to."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.kinds import ErrorMeasure as ErrorMeasure
from graphlens.lens.kinds import HeadName as HeadName
from graphlens.lens.kinds import LayerHeadTuple as LayerHeadTuple
from graphlens.lens.kinds import LayerToHead as LayerToHead
from graphlens.utils import HEAD_NAMES as HEAD_NAMES
from graphlens.utils import compute_head_attention_similarity_score as compute_head_attention_similarity_score
from graphlens.utils import detect_head as detect_head
from graphlens.utils import get_duplicate_token_head_detection_pattern as get_duplicate_token_head_detection_pattern
from graphlens.utils import get_induction_head_detection_pattern as get_induction_head_detection_pattern
from graphlens.utils import get_previous_token_head_detection_pattern as get_previous_token_head_detection_pattern
from graphlens.utils import get_supported_heads as get_supported_heads

__getattr__ = refusing(__name__)
