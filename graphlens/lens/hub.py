"""TransformerLens's helpers around the Hugging Face hub: single files, small data sets, arguments that fit a call."""

from __future__ import annotations

import functools
import inspect
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from graphlens.errors import InputError, ModelFileError, RuntimeUnavailable, checked_number

if TYPE_CHECKING:
    from datasets import Dataset

AnswerT = TypeVar("AnswerT")
# Names of small data sets -> theirs on the hub.
DATASETS = {
    "openwebtext": "stas/openwebtext-10k",
    "owt": "stas/openwebtext-10k",
    "pile": "NeelNanda/pile-10k",
    "c4": "NeelNanda/c4-10k",
    "code": "NeelNanda/code-10k",
    "python": "NeelNanda/code-10k",
    "c4_code": "NeelNanda/c4-code-20k",
    "c4-code": "NeelNanda/c4-code-20k",
    "wiki": "NeelNanda/wiki-10k",
}
_LONGEST_WAIT = 120.0


def get_hf_token() -> str | None:
    """The hub's access token in the environment (HF_TOKEN), or None."""
    return os.environ.get("HF_TOKEN") or None


def call_hf_with_retry(
    func: Callable[..., AnswerT], *args: object, max_attempts: int = 3, base_delay: float = 10.0, **kwargs: object
) -> AnswerT:
    """Calls a function again when the hub says that there were too many requests (HTTP 429).

    Args:
        func: The function.
        *args: Its arguments.
        max_attempts: How often it is called at most.
        base_delay: Seconds before the second call, twice as many before each further one, unless the hub says how many.
        **kwargs: Its arguments by name.

    Raises:
        Exception: What the function raised, the last time or for another reason.
    """
    for attempt in range(checked_number(max_attempts, "max_attempts", least=1) - 1):
        try:
            return func(*args, **kwargs)
        except Exception as error:  # whatever library raised it: the answer that it holds decides
            answer = getattr(error, "response", None)
            if getattr(answer, "status_code", None) != 429:
                raise
            told = str((getattr(answer, "headers", None) or {}).get("Retry-After", ""))
            usual = min(base_delay * 2**attempt, _LONGEST_WAIT) * random.uniform(0.8, 1.2)
            time.sleep(float(told) if told.replace(".", "", 1).isdigit() else usual)
    return func(*args, **kwargs)


def get_rotary_pct_from_config(config: object) -> float:
    """The share of a head that a transformers config rotates: 1.0 where it says nothing.

    Args:
        config: The config, or None.
    """
    parameters = getattr(config, "rope_parameters", None)
    told = parameters.get("partial_rotary_factor", 1.0) if isinstance(parameters, dict) else 1.0
    return float(getattr(config, "rotary_pct", told))


def select_compatible_kwargs(kwargs_dict: Mapping[str, object], callable: Callable[..., object]) -> dict[str, object]:
    """The arguments by name that a function takes.

    Args:
        kwargs_dict: Arguments by name.
        callable: The function.
    """
    taken = inspect.getfullargspec(callable).args
    return {name: value for name, value in kwargs_dict.items() if name in taken}


def download_file_from_hf(
    repo_name: str,
    file_name: str,
    subfolder: str = ".",
    cache_dir: str | None = None,
    force_is_torch: bool = False,
    **kwargs: object,
) -> object:
    """A file of a repository on the Hugging Face hub: what a ``.json`` or ``.pth`` file holds, the path of another.

    Args:
        repo_name: The repository.
        file_name: The file.
        subfolder: Where it lies in the repository.
        cache_dir: The hub's cache folder; None for its usual one.
        force_is_torch: True reads a file of another name as ``.pth``.
        **kwargs: Other arguments of ``hf_hub_download``; those that it does not take are left out.

    Returns:
        What the file holds, tensors on the CPU; or its local path.

    Raises:
        ModelFileError: A ``.pth`` file holds something else than tensors and plain values: it could run code as it is read.
    """
    from huggingface_hub import hf_hub_download

    options = select_compatible_kwargs(kwargs, hf_hub_download)
    fetch = functools.partial(hf_hub_download, repo_name, file_name, subfolder=subfolder, cache_dir=cache_dir)
    path = call_hf_with_retry(functools.partial(fetch, **options))
    if force_is_torch or path.endswith(".pth"):
        return _tensors(path)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path.endswith(".json") else path


def _tensors(path: str) -> object:
    """What a file of torch's holds, if that is tensors and plain values."""
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelFileError(
            f"{path}: holds more than tensors and plain values, so reading it could run code that is in it. If you trust it, "
            "read it with torch.load(path, weights_only=False)."
        ) from error


def clear_huggingface_cache() -> NoReturn:
    """Refused: it would delete every model and data set that any program of this user took from the hub.

    Raises:
        InputError: Always; it says what to do.
    """
    raise InputError(
        "clear_huggingface_cache() would delete every model and data set that any program of yours took from the hub, so "
        "graphlens does not do it. Delete single ones with: hf cache rm. graphlens's own exports lie in the folder that "
        "GRAPHLENS_CACHE names."
    )


def keep_single_column(dataset: Dataset, col_name: str) -> Dataset:
    """A data set with one of its columns.

    Args:
        dataset: A ``datasets`` Dataset or IterableDataset.
        col_name: The column that stays.
    """
    for name in list(dataset.features):
        if name != col_name:
            dataset = dataset.remove_columns(name)
    return dataset


def get_dataset(dataset_name: str, **kwargs: object) -> Dataset:
    """A small data set of the hub by a short name, for a first look at a model.

    Args:
        dataset_name: "openwebtext" ("owt"), "pile", "c4", "code" ("python"), "c4_code" or "wiki".
        **kwargs: Arguments of ``datasets.load_dataset``.

    Returns:
        A ``datasets`` Dataset with a column "text".

    Raises:
        InputError: For another name.
        RuntimeUnavailable: Without the package ``datasets``.
    """
    if dataset_name not in DATASETS:
        raise InputError(f"{dataset_name!r} is no data set known here: {', '.join(DATASETS)}.")
    return load_dataset(DATASETS[dataset_name], split="train", **kwargs)


def load_dataset(*args: object, **kwargs: object) -> Dataset:
    """``datasets.load_dataset``, which is imported for it.

    Args:
        *args: Its arguments.
        **kwargs: Its arguments by name.

    Raises:
        RuntimeUnavailable: The package is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise RuntimeUnavailable("this takes its data from the package datasets: pip install datasets.") from error
    return datasets.load_dataset(*args, **kwargs)
