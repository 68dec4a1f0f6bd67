"""TransformerLens's own objects that are code: its helpers, evaluations, hook points for one's own modules."""

from __future__ import annotations
