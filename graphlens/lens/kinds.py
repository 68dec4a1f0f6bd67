"""Names that TransformerLens has for annotations, and short tables that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

import torch

from graphlens.errors import InputError
from graphlens.views.wording import view_package

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

# Of the head detector
HeadName: TypeAlias = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
ErrorMeasure: TypeAlias = Literal["abs", "mul"]
LayerHeadTuple: TypeAlias = tuple[int, int]
LayerToHead: TypeAlias = dict[int, list[int]]
# Of patching
Logits = torch.Tensor
CorruptedActivation = torch.Tensor
PatchedActivation = torch.Tensor
AxisNames: TypeAlias = Literal["layer", "pos", "head_index", "head", "src_pos", "dest_pos"]
# Of models
SingleLoss = torch.Tensor
LossPerToken = torch.Tensor
Loss = torch.Tensor
DTYPE_FROM_STRING: Mapping[str, torch.dtype] = {
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}


@runtime_checkable
class ModelWithCfg(Protocol):
    """A model with a configuration, weights by name, and a place."""

    cfg: object

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its weights by name."""

    def to(self, device_or_dtype: torch.device | str | torch.dtype) -> object:
        """The model there, or in that dtype."""


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> pd.DataFrame:
    """Every combination of indices as a table, the last one fastest: an ``index_df`` of ``generic_activation_patch``.

    Args:
        column_max_ranges: The number of indices of each column.
        column_names: The columns' names.

    Returns:
        A pandas DataFrame with a row for each combination.

    Raises:
        InputError: Unless there is a name for each range.
        RuntimeUnavailable: Without pandas.
    """
    pandas = view_package("pandas", "make_df_from_ranges()")
    if len(column_max_ranges) != len(column_names):
        raise InputError(f"{len(column_max_ranges)} ranges and {len(column_names)} names: each column has both.")
    return pandas.DataFrame(product(*map(range, column_max_ranges)), columns=list(column_names))
