"""The forward of encoders (BERT), hook by hook as TransformerLens's HookedEncoder has it.

Attention, norms and linear maps are the decoder's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphlens.errors import ExportError
from graphlens.export.decoder import Inputs, put_norm
from graphlens.export.families import Spec
from graphlens.export.operations import ACTIVATIONS, hook_point, linear
from graphlens.export.post_norms import PostNormBlock


class Encoder(nn.Module):
    """The model as it is traced: the mask is an input, made ready outside.

    Args:
        model: transformers' model, freshly built; its blocks and norms are replaced in place.
        spec: What it computes.

    Raises:
        ExportError: An activation function is not known.
    """

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        super().__init__()
        assert spec.encoder is not None
        for act in (spec.mlp.act, spec.encoder.act):
            if act not in ACTIVATIONS:
                raise ExportError(
                    f"config.json asks for the activation function {act!r}; graphlens exports {', '.join(ACTIVATIONS)}."
                )
        self.model, self.spec, self.parts = model, spec, spec.encoder
        blocks = model.get_submodule(spec.blocks)
        for layer, old in list(blocks.named_children()):
            setattr(blocks, layer, PostNormBlock(old, spec, int(layer)))
        for path in (spec.embed_norm, spec.final_norm):
            put_norm(model, str(path), spec)

    def forward(self, input_ids: Tensor, mask: Tensor, token_types: Tensor) -> Tensor:
        """Logits [b, p, d_vocab].

        Args:
            input_ids: int64 [b, p].
            mask: bool [b, 1, 1, p], True at the tokens that all may attend to.
            token_types: int64 [b, p].
        """
        spec, parts, model = self.spec, self.parts, self.model
        positions = self._positions(input_ids)
        x = self._embedded(input_ids, spec.embed, "embed.hook_embed")
        x = x + self._embedded(positions, str(spec.pos_embed), "embed.hook_pos_embed")
        x = x + self._embedded(token_types, parts.token_types, "embed.hook_token_type_embed")
        x = hook_point(model.get_submodule(str(spec.embed_norm))(x, "embed.ln"), "hook_full_embed")
        inputs = Inputs(positions, mask, local_mask=mask, distance=positions)  # no layer reads the last two
        for block in model.get_submodule(spec.blocks).children():
            x = block(x, inputs, model)
        x = ACTIVATIONS[parts.act](linear(model.get_submodule(parts.dense), x, transposed=False))
        x = hook_point(model.get_submodule(str(spec.final_norm))(x, "mlm_head.ln"), "unembed.hook_in")
        return hook_point(linear(model.get_submodule(spec.head), x, transposed=False), "unembed.hook_out")

    def _embedded(self, ids: Tensor, path: str, name: str) -> Tensor:
        """The rows of an embedding [b, p, d_model], marked."""
        return hook_point(functional.embedding(ids, self.model.get_submodule(path).weight), name)

    def _positions(self, input_ids: Tensor) -> Tensor:
        """The rows of the position embeddings [b, p]."""
        if self.parts.padding is None:
            return torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0).expand(input_ids.shape)
        real = (input_ids != self.parts.padding).to(torch.int64)
        return torch.cumsum(real, 1) * real + self.parts.padding
