"""``transformer_lens.hook_points``: hook points, for one's own modules too."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.hook_points import DeviceType as DeviceType
from graphlens.lens.hook_points import HookFunction as HookFunction
from graphlens.lens.hook_points import HookPoint as HookPoint
from graphlens.lens.hook_points import LensHandle as LensHandle
from graphlens.lens.hook_points import NamesFilter as NamesFilter
from graphlens.lens.hooked_root_module import HookedRootModule as HookedRootModule
from graphlens.lens.hooked_root_module import HookIntrospectionMixin as HookIntrospectionMixin

__getattr__ = refusing(__name__)
