"""Indirect object identification on the torch face: TransformerLens's data set of prompts, and how a model does on it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from graphlens.errors import InputError, checked_number
from graphlens.lens.tokenizing import bos_of, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graphlens.model.torch_face import HookedTransformer


class IOIDataset(Dataset[dict[str, torch.Tensor]]):
    """Prompts whose last word is the indirect object of their last sentence (Wang et al. 2022, arXiv:2211.00593).

    The samples are TransformerLens's for the same seed. ``dataset[i]`` has "prompt", "IO" and "S", int64 [p] each.

    Args:
        tokenizer: What has ``encode(text)`` and ``bos_token_id``.
        templates: Texts with [A] for the indirect object, [B] for the subject, and the names of ``nouns`` in brackets.
        names: Names to take two of for each prompt; None for John and Mary.
        nouns: Placeholder -> the nouns to take one of.
        num_samples: How many prompts.
        symmetric: True gives each prompt with its names exchanged too.
        prepend_bos: Whether BOS comes before each prompt.
        seed: Makes the draw repeatable (it seeds Python's ``random``); None draws anew.

    Attributes:
        samples: {"text", "IO", "S"} of each prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: list[str] | None = None,
        names: list[str] | None = None,
        nouns: dict[str, list[str]] | None = None,
        num_samples: int = 1000,
        symmetric: bool = False,
        prepend_bos: bool = True,
        seed: int | None = None,
    ) -> None:
        if seed is not None:
            random.seed(seed)
        self.tokenizer = tokenizer
        self.prepend_bos = prepend_bos
        self.templates = self.get_default_templates() if templates is None else templates
        self.names = self.get_default_names() if names is None else names
        self.nouns = self.get_default_nouns() if nouns is None else nouns
        if len(self.names) < 2:
            raise InputError(f"IOIDataset takes two names for each prompt, and there are {len(self.names)}.")
        draws = num_samples // 2 if symmetric else num_samples
        self.samples = [sample for _ in range(draws) for sample in self.get_sample(symmetric)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        sample = self.samples[idx]
        ids = {key: list(self.tokenizer.encode(sample[key])) for key in ("text", "IO", "S")}
        before = [bos_of(self.tokenizer)] if self.prepend_bos else []
        return {
            "prompt": torch.tensor([*before, *ids["text"]], dtype=torch.long),
            "IO": torch.tensor(ids["IO"], dtype=torch.long),
            "S": torch.tensor(ids["S"], dtype=torch.long),
        }

    def get_sample(self, symmetric: bool = False) -> list[dict[str, str]]:
        """Draws a prompt.

        Args:
            symmetric: True gives it with its names exchanged too.

        Returns:
            One or two of {"text", "IO", "S"}; names have a space before them.
        """
        template = random.choice(self.templates)
        for placeholder, nouns in self.nouns.items():
            template = template.replace(f"[{placeholder}]", random.choice(nouns))
        first, second = random.sample(self.names, 2)
        pairs = [(first, second), *([(second, first)] if symmetric else [])]
        return [
            {"text": template.replace("[A]", io).replace("[B]", s), "IO": f" {io}", "S": f" {s}"} for io, s in pairs
        ]

    @staticmethod
    def get_default_names() -> list[str]:
        """John and Mary."""
        return ["John", "Mary"]

    @staticmethod
    def get_default_templates() -> list[str]:
        """Two sentences, in which the names come in either order."""
        return [
            "[A] and [B] went to the [LOCATION] to buy [OBJECT]. [B] handed the [OBJECT] to [A]",
            "Then, [B] and [A] went to the [LOCATION]. [B] gave the [OBJECT] to [A]",
        ]

    @staticmethod
    def get_default_nouns() -> dict[str, list[str]]:
        """What the default templates take: locations and objects."""
        return {"LOCATION": ["store", "market"], "OBJECT": ["milk", "eggs", "bread"]}


def ioi_eval(
    model: HookedTransformer,
    dataset: Dataset[dict[str, torch.Tensor]] | None = None,
    batch_size: int = 8,
    num_samples: int = 1000,
    tokenizer: PreTrainedTokenizerBase | None = None,
    symmetric: bool = False,
) -> dict[str, float]:
    """How often, and by how much, a model prefers the indirect object to the subject.

    Args:
        model: The model.
        dataset: What has the items of an IOIDataset; None makes one.
        batch_size: Prompts in a run.
        num_samples: How many prompts are made.
        tokenizer: See IOIDataset; None for the model's own.
        symmetric: See IOIDataset.

    Returns:
        {"Logit Difference": the mean, in nats, "Accuracy": the share above 0}. They are compared at the first token at
        which the two names differ.

    Raises:
        InputError: For two names that are one, and without a tokenizer.
    """
    if dataset is None:
        dataset = IOIDataset(tokenizer_of(model, tokenizer), num_samples=num_samples, symmetric=symmetric)
    differences: list[float] = []
    for start in range(0, len(dataset), checked_number(batch_size, "batch_size", least=1)):
        items = [dataset[at] for at in range(start, min(start + batch_size, len(dataset)))]
        prompts = torch.nn.utils.rnn.pad_sequence([item["prompt"] for item in items], batch_first=True)
        # What is padded comes after the prompt and changes nothing before it.
        with torch.no_grad():
            logits = model(prompts, return_type="logits", attention_mask=torch.ones_like(prompts))
        for row, item in zip(logits, items, strict=True):
            size = min(len(item["IO"]), len(item["S"]))
            unlike = torch.nonzero(item["IO"][:size] != item["S"][:size])
            if not len(unlike):
                raise InputError("the indirect object and the subject of a prompt are the same tokens.")
            at = int(unlike[0])
            place = row[len(item["prompt"]) - len(item["IO"]) + at - 1]
            differences.append(float(place[item["IO"][at]] - place[item["S"][at]]))
    return {
        "Logit Difference": sum(differences) / len(differences),
        "Accuracy": sum(difference > 0 for difference in differences) / len(differences),
    }
