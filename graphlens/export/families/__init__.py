"""Model families, a file each: what a Hugging Face architecture computes and where its weights lie.

To add one, write a file in this folder that registers a ``Family``, as ``llama.py`` does. Every file here is found by
itself. None may import torch or transformers: names are resolved where neither is installed.
"""

from __future__ import annotations

from graphlens.export.families.config_reader import ConfigReader as ConfigReader
from graphlens.export.families.family import Family as Family
from graphlens.export.families.family import aliases as aliases
from graphlens.export.families.family import families as families
from graphlens.export.families.family import family_for as family_for
from graphlens.export.families.family import hub_name as hub_name
from graphlens.export.families.family import nearest_names as nearest_names
from graphlens.export.families.family import register as register
from graphlens.export.families.family import register_family as register_family
from graphlens.export.families.spec import Attention as Attention
from graphlens.export.families.spec import EncoderParts as EncoderParts
from graphlens.export.families.spec import Experts as Experts
from graphlens.export.families.spec import Mlp as Mlp
from graphlens.export.families.spec import Norms as Norms
from graphlens.export.families.spec import Rotary as Rotary
from graphlens.export.families.spec import Spec as Spec
from graphlens.export.families.views import weight_views as weight_views
