"""SVDInterpreter: the directions that a head's or an MLP's weights work in, as they read on the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Literal, TypeAlias

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, working
from graphlens.analysis.factored_matrix import FactoredMatrix
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.names import in_block

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer

OUTPUT_EMBEDDING = "unembed.W_U"
VECTOR_TYPES = ["OV", "w_in", "w_out"]
VectorType: TypeAlias = Literal["OV", "w_in", "w_out"]


class SVDInterpreter(Generic[ArrayT]):
    """Singular vectors of a model's weights, through the unembedding (TransformerLens: ``SVDInterpreter``).

    See https://www.lesswrong.com/posts/mkbGjzxD8d8XqKHzA. The sign of a singular vector is free: only its two ends mean
    something, not which of them is positive.

    Args:
        model: The model, of either face.

    Attributes:
        model: The model.
        cfg: Its configuration.
        params: Its weights by TransformerLens's names, as they are when they are asked for.
    """

    def __init__(self, model: HookedTransformer[ArrayT]) -> None:
        self.model = model
        self.cfg = model.cfg

    @property
    def params(self) -> dict[str, ArrayT]:
        """The model's weights by TransformerLens's names."""
        return dict(self.model.named_parameters())

    def get_singular_vectors(
        self, vector_type: VectorType, layer_index: int, num_vectors: int = 10, head_index: int | None = None
    ) -> ArrayT:
        """The first singular vectors of a matrix on the side of the residual stream that they write to or read, by token.

        Args:
            vector_type: "OV" for what a head writes, "w_in" for what the neurons of a layer read, the norm's weights
                included, "w_out" for what they write.
            layer_index: The layer, from 0.
            num_vectors: How many, those of the largest singular values first.
            head_index: The head, for "OV".

        Returns:
            float [d_vocab, 1, num_vectors]: each vector times W_U.

        Raises:
            InputError: For another type, a layer, head or vector that there is not, and an MLP without such a matrix.
        """
        if not is_one_of(vector_type, VECTOR_TYPES):
            raise InputError(f"vector_type must be one of {VECTOR_TYPES}, not {vector_type!r}.")
        if head_index is None and vector_type == "OV":
            raise InputError("'OV' is a matrix of a head: pass head_index.")
        layer = checked_number(layer_index, "layer_index", least=0, most=self.cfg.n_layers - 1)
        if vector_type == "OV":
            head = checked_number(head_index, "head_index", least=0, most=self.cfg.n_heads - 1)
            vectors = FactoredMatrix(self._weight(layer, "attn.W_V")[head], self._weight(layer, "attn.W_O")[head]).V.T
        else:
            vectors = np.linalg.svd(self._mlp_matrix(layer, vector_type), full_matrices=False)[2]
        count = checked_number(num_vectors, "num_vectors", least=1, most=len(vectors))
        read = vectors[:count] @ self._array(OUTPUT_EMBEDDING)
        return self.model.border.to_user(np.ascontiguousarray(read.T)[:, None])

    def _mlp_matrix(self, layer: int, vector_type: str) -> Array:
        """A matrix of an MLP, [d_mlp, d_model]."""
        if vector_type == "w_out":
            return self._weight(layer, "mlp.W_out")
        matrix = self._weight(layer, "mlp.W_in").T
        norm = in_block(layer, "ln2.w")
        return matrix * self._array(norm) if norm in self.model.runner.weights else matrix

    def _weight(self, layer: int, name: str) -> Array:
        return self._array(in_block(layer, name))

    def _array(self, name: str) -> Array:
        """A weight in float32 at least. Raises InputError for one that the model lacks."""
        try:
            return working(self.model.runner.weights[name])
        except AttributeError as error:
            raise InputError(f"this model has no {name} to take singular vectors of: {error}") from error
