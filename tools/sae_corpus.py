"""The text that the embedded SAEs are trained on and measured with: rows like those of tiny-gpt2's own training."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from tiny_ioi import IoiExample, sample_ioi
from tokenizers import Tokenizer
from train_tiny import EOT, RECIPES, Recipe, model_dir, training_batches

MODEL = "tiny-gpt2"
ROW = 64  # tokens
_REPEATS = 0.1  # of the rows are a random sequence said over and over; in the model's training it were 30 %
Ids = npt.NDArray[np.int64]


def tokenizer() -> Tokenizer:
    """The model's tokenizer."""
    return Tokenizer.from_file(str(model_dir("gpt2") / "tokenizer.json"))


def rows(count: int, seed: int) -> Ids:
    """Rows of token ids, [count, ROW], each of which begins with ``EOT``. Another seed gives other rows."""
    recipe: Recipe = replace(
        RECIPES["gpt2"], seed=seed, steps=1, batch=count, row=ROW, names_steps=0, long_steps=0, repeat_share=_REPEATS
    )
    (batch,) = itertools.islice(training_batches(recipe, tokenizer()), 1)
    return np.array(batch)


def prompts(count: int, seed: int) -> tuple[list[list[int]], list[IoiExample]]:
    """Prompts whose next word is a name, made as those of the model's training: their ids, and what they say."""
    rng, read = random.Random(seed), tokenizer()
    examples = [sample_ioi(rng) for _ in range(count)]
    return [read.encode(EOT + example.prompt).ids for example in examples], examples
