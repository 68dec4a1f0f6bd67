"""TransformerLens's helpers around tokenizers: BOS by hand, padding masks, and data sets cut to rows of one length."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from graphlens.analysis.arrays import Array
from graphlens.errors import InputError, checked_number
from graphlens.lens.hub import keep_single_column
from graphlens.lens.tensors import get_cumsum_along_dim

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from graphlens.model.torch_face import HookedTransformer

TextT = TypeVar("TextT", str, list[str])
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"


def tokenize_and_concatenate(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = None,
    set_format: bool = True,
) -> Dataset:
    """A data set of texts as rows of tokens of one length: texts are joined with EOS between them, and cut.

    Within each batch that ``dataset.map`` hands out, what is left at the end is dropped; a batch that does not fill one
    row is padded to it, with PAD or, where the tokenizer has none, EOS.

    Args:
        dataset: A ``datasets`` Dataset or IterableDataset, or what has their ``map``, ``features`` and ``remove_columns``.
        tokenizer: A transformers tokenizer with BOS and EOS.
        streaming: True for an IterableDataset, which takes no ``num_proc``.
        max_length: Tokens in a row, BOS included.
        column_name: Where the text is.
        add_bos_token: Whether each row begins with BOS.
        num_proc: In how many processes; None for this one alone.
        set_format: True makes rows come out as tensors; an IterableDataset cannot.

    Returns:
        A data set of the same kind with one column, "tokens": int64 [max_length].

    Raises:
        InputError: For a tokenizer without EOS, or without BOS where rows begin with it.
    """
    length = checked_number(max_length, "max_length", least=2) - bool(add_bos_token)
    if tokenizer.eos_token_id is None or (add_bos_token and tokenizer.bos_token_id is None):
        raise InputError("this tokenizer has no EOS to put between texts, or no BOS to put before rows.")
    fill = tokenizer.eos_token_id if tokenizer.pad_token is None else tokenizer.pad_token_id
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})

    def rows(examples: Mapping[str, Sequence[str]]) -> dict[str, Array]:
        if not examples[column_name]:
            return {"tokens": np.zeros((0,), np.int64)}
        joined: list[int] = []
        for number, row in enumerate(tokenizer(examples[column_name], add_special_tokens=False)["input_ids"]):
            joined += [*([tokenizer.eos_token_id] if number else []), *row]
        missing = max(length - len(joined), 0)
        tokens = np.asarray([*joined, *[fill] * missing], np.int64)
        tokens = tokens[: len(tokens) // length * length].reshape(-1, length)
        if add_bos_token:
            tokens = np.insert(tokens, 0, tokenizer.bos_token_id, axis=1)
        return {"tokens": tokens}

    dataset = keep_single_column(dataset, column_name)
    options = {} if streaming else {"num_proc": num_proc}
    with _quiet(tokenizer):
        found = dataset.map(rows, batched=True, remove_columns=[column_name], **options)
    if set_format:
        found.set_format(type="torch", columns=["tokens"])
    return found


@contextlib.contextmanager
def _quiet(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Without transformers's warning of texts longer than a model takes: they are cut afterwards."""
    warned = getattr(tokenizer, "deprecation_warnings", None)
    if warned is None:
        yield
        return
    before = dict(warned)
    warned[_TOO_LONG] = False
    try:
        yield
    finally:
        warned.clear()
        warned.update(before)


def get_tokenizer_with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that puts BOS before texts by itself; the same one if it does so already or has no BOS.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        A transformers tokenizer, loaded again with ``add_bos_token=True``; of the same ``padding_side``.
    """
    settings = dict(tokenizer.init_kwargs)
    name = settings.pop("name_or_path", None) or tokenizer.name_or_path
    adds = settings.pop("add_bos_token", None)
    if tokenizer.bos_token is None or (getattr(tokenizer, "add_bos_token", False) if adds is None else adds):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            name, add_bos_token=True, token=os.environ.get("HF_TOKEN") or None, **settings
        )
    except ValueError:  # a BOS that tokenizers' templates cannot hold, with a colon say: such models add none
        return tokenizer
    found.padding_side = tokenizer.padding_side
    return found


def get_input_with_manually_prepended_bos(bos_token: str | None, input: TextT) -> TextT:
    """Text with BOS before it.

    Args:
        bos_token: BOS as text; None for a tokenizer that has none, which leaves the text as it is.
        input: A text, or a list of them.
    """
    if bos_token is None:
        return input
    return bos_token + input if isinstance(input, str) else [bos_token + text for text in input]


def get_tokens_with_bos_removed(
    tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor, padding_side: str | None = None
) -> torch.Tensor:
    """Tokens without each row's BOS.

    Args:
        tokenizer: The tokenizer that made them.
        tokens: int [b, p], or with "right" [..., p].
        padding_side: Where rows are padded: BOS comes first with "right", after the padding with "left". None for the
            tokenizer's own side.

    Returns:
        int [b, p-1]; the same tokens where the tokenizer has no BOS.

    Raises:
        InputError: For a row without BOS.
    """
    if tokenizer.bos_token_id is None:
        return tokens
    if (padding_side or tokenizer.padding_side) == "right":
        return tokens[..., 1:]
    if tokenizer.bos_token_id == tokenizer.pad_token_id:
        # The last of the leading PADs is BOS.
        places = _leading(tokens, tokenizer.pad_token_id).sum(-1) - 1
    else:
        places = (tokens == tokenizer.bos_token_id).int().argmax(-1)
    if (tokens.gather(-1, places.clamp(min=0)[:, None]) != tokenizer.bos_token_id).any():
        raise InputError("a row of these tokens has no BOS to remove.")
    kept = torch.arange(tokens.shape[-1], device=tokens.device) != places[:, None]
    return tokens[kept].reshape(tokens.shape[0], -1)


def get_attention_mask(
    tokenizer: PreTrainedTokenizerBase | None, tokens: torch.Tensor, prepend_bos: bool, padding_side: str | None = None
) -> torch.Tensor:
    """Which tokens are no padding: PADs count as that at the padded end of a row alone.

    Args:
        tokenizer: The tokenizer; None takes every token for a real one.
        tokens: int [b, p].
        prepend_bos: Whether rows begin with BOS: where BOS and PAD are one token, the last of the leading ones is real.
        padding_side: "left" or "right"; None for the tokenizer's own.

    Returns:
        int [b, p]: 1 at real tokens, 0 at padding.
    """
    mask = torch.ones_like(tokens)
    if tokenizer is None:
        return mask
    if (padding_side or tokenizer.padding_side) == "right":
        mask[get_cumsum_along_dim(tokens != tokenizer.pad_token_id, -1, reverse=True) == 0] = 0
        return mask
    leading = _leading(tokens, tokenizer.pad_token_id)
    mask[leading] = 0
    if prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
        mask[torch.arange(len(mask)), leading.sum(-1) - 1] = 1
    return mask


def _leading(tokens: torch.Tensor, token: int) -> torch.Tensor:
    """Where rows begin with one token, bool [b, p]."""
    return get_cumsum_along_dim(tokens != token, -1) == 0


def tokenizer_of(model: HookedTransformer, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer, or the model's own where none is given.

    Args:
        model: The model.
        tokenizer: A tokenizer, or None.

    Raises:
        InputError: The model has none either.
    """
    found = model.tokenizer if tokenizer is None else tokenizer
    if found is None:
        raise InputError("this model has no tokenizer: pass tokenizer=.")
    return found


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a tokenizer's BOS.

    Args:
        tokenizer: The tokenizer.

    Raises:
        InputError: It has none.
    """
    if tokenizer.bos_token_id is None:
        raise InputError("this tokenizer has no BOS: pass prepend_bos=False.")
    return int(tokenizer.bos_token_id)
