"""Rough evaluations of a model on the torch face: TransformerLens's losses on texts, induction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.utils.data import DataLoader

from graphlens.errors import InputError, checked_number
from graphlens.lens.hub import load_dataset
from graphlens.lens.logits import lm_cross_entropy_loss
from graphlens.lens.tokenizing import bos_of, tokenize_and_concatenate, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graphlens.model.torch_face import HookedTransformer

Batch: TypeAlias = dict[str, torch.Tensor]
# The first sentences of Olah et al., "Zoom In: An Introduction to Circuits" (Distill, 2020, CC BY 4.0).
ZOOM_IN = (
    "Many important transition points in the history of science have been moments when science 'zoomed in.' At these "
    "points, we develop a visualization or tool that allows us to see the world in a new level of detail, and a new field "
    "of science develops to study the world through this lens."
)


def sanity_check(model: HookedTransformer) -> torch.Tensor:
    """The loss on a short English text: under 5 in a language model that works, over 7 in one that does not.

    Args:
        model: The model.

    Returns:
        A scalar, in nats.
    """
    return model(ZOOM_IN, return_type="loss")


# Losses on data sets of the hub


def _loader(tokenizer: PreTrainedTokenizerBase, batch_size: int, column: str, *names: str) -> DataLoader[Batch]:
    """Batches of rows of tokens of a data set of the hub, in random order."""
    data = load_dataset(*names, split="train")
    print(len(data))
    rows = tokenize_and_concatenate(data, tokenizer, column_name=column)
    return DataLoader(rows, batch_size=batch_size, shuffle=True, drop_last=True)


def make_wiki_data_loader(tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> DataLoader[Batch]:
    """Batches of tokens of WikiText-2. It takes the package ``datasets``, and a connection the first time.

    Args:
        tokenizer: A transformers tokenizer.
        batch_size: Rows in a batch.

    Returns:
        A DataLoader of {"tokens": int64 [batch_size, 1024]}.

    Raises:
        RuntimeUnavailable: Without ``datasets``.
    """
    return _loader(tokenizer, batch_size, "text", "wikitext", "wikitext-2-v1")


def make_owt_data_loader(tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> DataLoader[Batch]:
    """Batches of tokens of 10,000 texts of OpenWebText; see make_wiki_data_loader.

    Args:
        tokenizer: A transformers tokenizer.
        batch_size: Rows in a batch.

    Raises:
        RuntimeUnavailable: Without ``datasets``.
    """
    return _loader(tokenizer, batch_size, "text", "stas/openwebtext-10k")


def make_pile_data_loader(tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> DataLoader[Batch]:
    """Batches of tokens of 10,000 texts of The Pile; see make_wiki_data_loader.

    Args:
        tokenizer: A transformers tokenizer.
        batch_size: Rows in a batch.

    Raises:
        RuntimeUnavailable: Without ``datasets``.
    """
    return _loader(tokenizer, batch_size, "text", "NeelNanda/pile-10k")


def make_code_data_loader(tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> DataLoader[Batch]:
    """Batches of tokens of Python files of CodeParrot; see make_wiki_data_loader.

    Args:
        tokenizer: A transformers tokenizer.
        batch_size: Rows in a batch.

    Raises:
        RuntimeUnavailable: Without ``datasets``.
    """
    return _loader(tokenizer, batch_size, "content", "codeparrot/codeparrot-valid-v2-near-dedup")


DATASET_NAMES = ["wiki", "owt", "pile", "code"]
DATASET_LOADERS = [make_wiki_data_loader, make_owt_data_loader, make_pile_data_loader, make_code_data_loader]


def evaluate_on_dataset(
    model: HookedTransformer,
    data_loader: Iterable[Batch],
    truncate: int = 100,
    device: torch.device | str | None = None,
) -> float:
    """The mean loss over batches of tokens.

    Args:
        model: The model.
        data_loader: Batches, each {"tokens": int64 [b, p]}.
        truncate: The number of batches after which it stops is one more than this, as in TransformerLens.
        device: Changes nothing: tokens go where the model is.

    Returns:
        Nats a token: the mean over batches of each one's mean.

    Raises:
        InputError: For a loader without a batch.
    """
    losses: list[float] = []
    for batch in data_loader:
        with torch.no_grad():
            losses.append(float(model(batch["tokens"], return_type="loss").mean()))
        if len(losses) > truncate:
            break
    if not losses:
        raise InputError("data_loader gave no batch to take a loss on.")
    return sum(losses) / len(losses)


def evaluate(
    model: HookedTransformer, truncate: int = 100, batch_size: int = 8, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, float]:
    """``evaluate_on_dataset`` on WikiText-2, OpenWebText, The Pile and CodeParrot, printed as it goes.

    Args:
        model: The model.
        truncate: See evaluate_on_dataset.
        batch_size: Rows in a batch.
        tokenizer: A transformers tokenizer; None for the model's own.

    Returns:
        {"wiki_loss": ..., "owt_loss": ..., "pile_loss": ..., "code_loss": ...}.

    Raises:
        RuntimeUnavailable: Without the package ``datasets``.
    """
    losses: dict[str, float] = {}
    for name, make in zip(DATASET_NAMES, DATASET_LOADERS, strict=True):
        loader = make(tokenizer=tokenizer_of(model, tokenizer), batch_size=batch_size)
        losses[f"{name}_loss"] = evaluate_on_dataset(model, loader, truncate=truncate)
        print(f"{name}: {losses[f'{name}_loss']}")
    return losses


def induction_loss(
    model: HookedTransformer,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 4,
    subseq_len: int = 384,
    prepend_bos: bool | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The mean loss on the second half of random tokens that repeat: low in a model with induction heads.

    The tokens are TransformerLens's for the same ``torch.manual_seed`` where the vocabulary has 20,000 tokens or more.

    Args:
        model: The model.
        tokenizer: What has ``bos_token_id``; None for the model's own.
        batch_size: The number of sequences.
        subseq_len: The length of a half; twice that must fit into the model's context.
        prepend_bos: Whether BOS takes the first place; None for the model's default.
        device: Changes nothing: tokens go where the model is.

    Returns:
        A scalar, in nats.

    Raises:
        InputError: For sequences that do not fit, and BOS without a tokenizer.
    """
    length = checked_number(subseq_len, "subseq_len", least=3, most=model.cfg.n_ctx // 2)
    vocabulary = model.cfg.d_vocab
    low, high = (100, min(20000, vocabulary)) if vocabulary >= 1000 else (0, vocabulary)
    tokens = torch.randint(low, high, (batch_size, length)).repeat(1, 2)
    if model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos:
        tokens[:, 0] = bos_of(tokenizer_of(model, tokenizer))
    with torch.no_grad():
        losses = lm_cross_entropy_loss(model(tokens, return_type="logits"), tokens, per_token=True)
        return losses[:, length + 1 :].mean()
