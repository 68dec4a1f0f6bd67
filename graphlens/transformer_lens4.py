"""TransformerLens 4: its TransformerBridge over graphlens, and graphlens behind its own RemoteBridge.

``TransformerBridge`` needs torch, ``boot`` TransformerLens 4 besides.
"""

from __future__ import annotations

from graphlens.errors import RuntimeUnavailable

try:
    import torch  # noqa: F401
except ImportError as error:
    raise RuntimeUnavailable("graphlens.transformer_lens4 needs torch: pip install 'graphlens-onnx[torch]'.") from error

from graphlens.lens.bridge import TransformerBridge
from graphlens.lens.remote import boot

__all__ = ["TransformerBridge", "boot"]
