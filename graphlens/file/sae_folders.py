"""Every layout of SAEs that graphlens ships, gathered: importing this registers them."""

from __future__ import annotations

from graphlens.file.sae_cross_layer import LAYOUT as CROSS_LAYER
from graphlens.file.sae_dictionary_learning import LAYOUT as DICTIONARY_LEARNING
from graphlens.file.sae_gemma_scope import LATER, LAYOUT
from graphlens.file.sae_layouts import Asked, Layout, StoredSae, layouts, read_folder
from graphlens.file.sae_saelens import LAYOUT as SAELENS
from graphlens.file.sae_sparsify import LAYOUT as SPARSIFY

SHIPPED: tuple[Layout, ...] = (SAELENS, SPARSIFY, DICTIONARY_LEARNING, LAYOUT, LATER, CROSS_LAYER)

__all__ = ["SHIPPED", "Asked", "Layout", "StoredSae", "layouts", "read_folder"]
