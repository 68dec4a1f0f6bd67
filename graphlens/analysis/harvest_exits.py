"""Harvests as other packages read them: Arrow, Hugging Face datasets, torch's data loaders, SAELens's cached activations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.errors import InputError, RuntimeUnavailable
from graphlens.file.folder import new_folder
from graphlens.file.harvest_files import DOCUMENTS, POSITIONS, TOKENS

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import ray.data

    from graphlens.analysis.harvest import Harvest

_BESIDE = (TOKENS, DOCUMENTS, POSITIONS)


def _columns(harvest: Harvest, names: str | Sequence[str] | None) -> list[str]:
    """The columns that are wanted: by default what lies beside the activations, and all hook points."""
    if names is None:
        return [*_BESIDE, *(harvest.names if harvest.plan.written else ())]
    asked = [names] if isinstance(names, str) else list(names)
    for name in asked:
        if name not in _BESIDE:
            harvest[name]  # raises where it was not harvested
    return asked


def _readable(array: Array) -> Array:
    """Bfloat16, which no package here reads, as float32: exact, and a copy. Others as they are."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def to_arrow(harvest: Harvest, names: str | Sequence[str] | None = None) -> pa.Table:
    """See ``Harvest.to_arrow``."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise RuntimeUnavailable("Arrow tables need the package pyarrow: pip install pyarrow.") from error

    def column(array: Array) -> pa.Array:
        array = np.ascontiguousarray(_readable(array))
        kind = pa.from_numpy_dtype(array.dtype)
        found = pa.Array.from_buffers(kind, array.size, [None, pa.py_buffer(array)])
        for size in reversed(array.shape[1:]):
            found = pa.FixedSizeListArray.from_arrays(found, size)
        return found

    asked = _columns(harvest, names)
    parts = []
    for index in range(len(harvest.plan.shards)):
        shard = harvest.shard(index)
        parts.append(pa.RecordBatch.from_arrays([column(shard[name]) for name in asked], names=asked))
    return pa.Table.from_batches(parts)


def to_datasets(harvest: Harvest, names: str | Sequence[str] | None = None) -> datasets.Dataset:
    """See ``Harvest.to_datasets``."""
    try:
        from datasets import Dataset
        from datasets.table import InMemoryTable
    except ImportError as error:
        raise RuntimeUnavailable("Hugging Face datasets need the package datasets: pip install datasets.") from error
    return Dataset(InMemoryTable(to_arrow(harvest, names)))


def to_ray(harvest: Harvest, names: str | Sequence[str] | None = None) -> ray.data.Dataset:
    """See ``Harvest.to_ray``."""
    asked, count = _columns(harvest, names), len(harvest.plan.shards)
    try:
        import ray.data
    except ImportError as error:
        raise RuntimeUnavailable("Ray Data needs Ray: pip install 'graphlens-onnx[ray]'.") from error
    shards = ray.data.range(count, override_num_blocks=count)
    return shards.map_batches(_read_shard, batch_size=1, fn_kwargs={"harvest": harvest, "names": asked})


def _read_shard(batch: Mapping[str, Array], harvest: Harvest, names: Sequence[str]) -> dict[str, Array]:
    """The arrays of one shard, in whichever process this is called."""
    shard = harvest.shard(int(batch["id"][0]))
    return {name: np.array(_readable(shard[name])) for name in names}


class TokenDataset:
    """The tokens of a harvest as torch's DataLoader takes them: a dataset by place, each entry a dict of arrays.

    Args:
        harvest: The harvest.
        names: Hook points, or also "tokens", "documents", "positions".
    """

    def __init__(self, harvest: Harvest, names: str | Sequence[str] | None = None) -> None:
        self._harvest, self._names = harvest, _columns(harvest, names)

    def __len__(self) -> int:
        return len(self._harvest)

    def __getitem__(self, index: int) -> dict[str, Array]:
        """One token: name -> [*shape]."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Array]]:
        """Several tokens, read together: what a DataLoader asks for."""
        found = {name: _readable(self._harvest.column(name)[np.asarray(indices, np.int64)]) for name in self._names}
        return [{name: array[row] for name, array in found.items()} for row in range(len(indices))]


def save_saelens(harvest: Harvest, folder: str | os.PathLike[str], name: str) -> None:
    """See ``Harvest.save_saelens``."""
    try:
        from datasets import Array2D, Dataset, Features, Sequence, Value
    except ImportError as error:
        raise RuntimeUnavailable(
            "SAELens's cached activations need the package datasets: pip install datasets."
        ) from error
    column, context = harvest[name], harvest.plan.layout.context
    rows = _whole_rows(harvest, context)
    width = harvest.plan.width(name)
    dtype = "float16" if harvest.plan.dtype == "float16" else "float32"
    features = Features(
        {name: Array2D(shape=(context, width), dtype=dtype), "token_ids": Sequence(Value("int32"), length=context)}
    )

    def every() -> Iterator[Mapping[str, Array]]:
        for first in range(0, rows * context, context):
            values = _readable(column[first : first + context]).reshape(context, width)
            yield {name: values, "token_ids": harvest.tokens[first : first + context]}

    with new_folder(folder) as stage:
        made = Dataset.from_generator(every, features=features, cache_dir=str(stage / "cache"))
        made.save_to_disk(str(stage / "saved"))
        del made
        import shutil

        shutil.rmtree(stage / "cache")
        for file in (stage / "saved").iterdir():
            file.rename(stage / file.name)
        (stage / "saved").rmdir()


def _whole_rows(harvest: Harvest, context: int) -> int:
    """How many rows of ``context`` tokens a harvest is made of; a last one that is shorter is left out.

    Raises:
        InputError: Rows give other numbers of tokens.
    """
    rows = len(harvest) // context
    for first in range(0, rows * context, context):
        if not np.array_equal(harvest.positions[first : first + context], np.arange(context)):
            raise InputError(
                f"{harvest.path}: SAELens reads rows of one length, and the row at token {first:,} has not {context:,} tokens. "
                "Harvest with pack=True or keep_pad=True, and keep_bos=True."
            )
    if not rows:
        raise InputError(
            f"{harvest.path}: SAELens reads rows of one length, and there is no row of {context:,} tokens."
        )
    return rows
