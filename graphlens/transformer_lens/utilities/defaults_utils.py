"""``transformer_lens.utilities.defaults_utils``: a model's defaults for text."""

from __future__ import annotations

from graphlens.lens.absent import refusing
from graphlens.lens.defaults import USE_DEFAULT_VALUE as USE_DEFAULT_VALUE
from graphlens.lens.defaults import LocallyOverridenDefaults as LocallyOverridenDefaults
from graphlens.lens.defaults import override_or_use_default_value as override_or_use_default_value

__getattr__ = refusing(__name__)
