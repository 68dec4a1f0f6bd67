"""Model families, a file each: where a Hugging Face architecture carries TransformerLens's hook points and weights.

To add one, write a file in this folder that registers a ``Family``, as ``gpt2.py`` does. Every file here is found by
itself. None may import torch or transformers: names are resolved where neither is installed.
"""

from __future__ import annotations

from graphlens.export.families.family import Family as Family
from graphlens.export.families.family import Tap as Tap
from graphlens.export.families.family import Weight as Weight
from graphlens.export.families.family import aliases as aliases
from graphlens.export.families.family import families as families
from graphlens.export.families.family import family_for as family_for
from graphlens.export.families.family import register as register
from graphlens.export.families.family import weight_views as weight_views
