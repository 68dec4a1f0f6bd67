"""Every layout of SAEs that graphlens ships, registered in the order in which a folder is tried."""

from __future__ import annotations

from graphlens.file import sae_cross_layer, sae_dictionary_learning, sae_gemma_scope, sae_saelens, sae_sparsify
from graphlens.file.sae_layouts import Asked, Layout, StoredSae, layouts, read_folder, register

SHIPPED: tuple[Layout, ...] = (
    register(sae_saelens.LAYOUT),
    register(sae_sparsify.LAYOUT),
    register(sae_dictionary_learning.LAYOUT),
    register(sae_gemma_scope.LAYOUT),
    register(sae_gemma_scope.LATER),
    register(sae_cross_layer.LAYOUT),
)

__all__ = ["SHIPPED", "Asked", "Layout", "StoredSae", "layouts", "read_folder"]
