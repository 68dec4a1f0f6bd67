"""``transformer_lens.utilities.initialization_utils``: random initial weights."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.initial import NonlinearityType as NonlinearityType
from graphlens.lens.initial import calc_fan_in_and_fan_out as calc_fan_in_and_fan_out
from graphlens.lens.initial import init_kaiming_normal_ as init_kaiming_normal_
from graphlens.lens.initial import init_kaiming_uniform_ as init_kaiming_uniform_
from graphlens.lens.initial import init_xavier_normal_ as init_xavier_normal_
from graphlens.lens.initial import init_xavier_uniform_ as init_xavier_uniform_

__getattr__ = refusing(__name__)
