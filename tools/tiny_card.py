"""Evaluate the embedded models and write their model cards, or check the cards that are there.

    python tools/tiny_card.py            # evaluate, write models/tiny-gpt2/README.md and models/tiny-llama/README.md
    python tools/tiny_card.py --check    # evaluate, exit 1 where a card says something else

Every figure on a card comes from this run (``tiny_figures``). Needs torch and transformers; takes seconds a model on a CPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_figures import (
    N_IOI,
    N_LEAK_CHECKS,
    N_REPEATS,
    N_STORIES,
    REPEAT_LENGTH,
    SAMPLE_TOKENS,
    Figures,
    IoiScores,
    Subject,
    evaluate,
    load,
)
from tiny_ioi import HELD_OUT_CLOSINGS, HELD_OUT_OPENINGS, SHAKEN_SHARE, training_openings
from tiny_stories import STORY_HOLD_OUT
from tiny_words import EOT, NAMES, PAIR_HOLD_OUT, name_pairs
from train_tiny import DEFAULT, RECIPES, model_dir
from transformers import PretrainedConfig
from transformers.utils import logging

# What the card may not fall below, whatever the training run.
AIM = 0.98  # accuracy
MIN_ACCURACY = {"gpt2": AIM, "llama": 0.97}
MIN_LOGIT_DIFFERENCE = 3.0
MIN_INDUCTION = 0.7

NUMBER = re.compile(r"(-?\d+\.\d+)")


@dataclass(frozen=True)
class Words:
    """What a card says of its architecture alone.

    Attributes:
        name: What the architecture is called.
        choices: What was chosen after seeing figures on held-out data.
        shape: The table's row: sizes and kinds of layers.
        start: An item of the list on training: what is special in the first weights.
    """

    name: str
    choices: str
    shape: Callable[[PretrainedConfig], str]
    start: str = ""


def _shape_of_gpt2(config: PretrainedConfig) -> str:
    return (
        f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, MLP {config.n_inner}, "
        f"`{config.activation_function}`, tied embeddings"
    )


def _shape_of_llama(config: PretrainedConfig) -> str:
    return (
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads over {config.num_key_value_heads} key-value "
        f"heads, width {config.hidden_size}, rotary positions, RMSNorm, gated MLP {config.intermediate_size}, "
        f"`{config.hidden_act}`, tied embeddings"
    )


WORDS = {
    "gpt2": Words(
        "GPT-2",
        """Two choices were made after seeing such rows: the
seed is the better of two in an earlier training on one thread (the other's names alone were at 0.96), and a still earlier
model's mistakes led to more varied training closings; the held-out frames were not touched.""",
        _shape_of_gpt2,
    ),
    "llama": Words(
        "Llama",
        """The texts were chosen for tiny-gpt2,
and its card says how. Here the start of training was: with tiny-gpt2's recipe a Llama had learned neither task after a thousand
steps, on such rows and others, and was given the start below. The floor of the check, 0.97, was set after seeing these rows.""",
        _shape_of_llama,
        """- The first head of the first layer begins with its attention on the token before (`attend_to_previous` in the
  tool), and all embeddings with a common part that it reads; the rest is random. With tiny-gpt2's start, induction had not
  begun after a thousand steps.
""",
    ),
}


def shortfalls(architecture: str, figures: Figures) -> list[str]:
    """What falls below the floors above, in words."""
    found = []
    for name, scores, least in (
        ("held-out names and templates", figures.both, MIN_ACCURACY[architecture]),
        ("held-out names", figures.new_names, MIN_ACCURACY[architecture]),
    ):
        if scores.top < least:
            found.append(f"accuracy on {name} is {scores.top:.3f}, below {least}")
        if scores.difference < MIN_LOGIT_DIFFERENCE:
            found.append(f"logit difference on {name} is {scores.difference:.2f}, below {MIN_LOGIT_DIFFERENCE}")
    if figures.leaks:
        found.append(f"training documents hold what is held out of them: {figures.leaks[:3]}")
    if figures.heads["induction"].score < MIN_INDUCTION:
        found.append(f"induction score is {figures.heads['induction'].score:.2f}, below {MIN_INDUCTION}")
    found += [
        f"wrong answer {token!r} to {example.prompt!r}"
        for example, token, _ in figures.classic
        if token != f" {example.io}"
    ]
    return found


def _ioi_row(name: str, scores: IoiScores) -> str:
    return f"| {name} | {scores.top:.3f} | {scores.above:.3f} | {scores.difference:.2f} | {scores.answer_loss:.3f} |"


def render(architecture: str, subject: Subject, figures: Figures) -> str:
    """The model card, as Markdown."""
    config, heads, maker = subject.model.config, figures.heads, type(subject.model).__name__
    recipe, words = RECIPES[architecture], WORDS[architecture]
    name, options = f"tiny-{architecture}", "" if architecture == DEFAULT else f" --architecture {architecture}"
    held, total = len(name_pairs("held_out")), len(NAMES) * (len(NAMES) - 1) // 2
    rows = {
        "name pair and template (whole opening and whole closing)": figures.both,
        "name pair only": figures.new_names,
        "template only": figures.new_templates,
        "name pair and opening": figures.new_openings,
    }
    ioi_rows = "\n".join(_ioi_row(row, scores) for row, scores in rows.items())
    below = [f'"{row}" is at {scores.top:.3f}' for row, scores in rows.items() if scores.top < AIM]
    classic_rows = "\n".join(
        f"| {example.prompt} | `{token}` | {difference:.2f} |" for example, token, difference in figures.classic
    )
    opening_rows = "\n".join(
        f"| {opening} | {scores.top:.3f} | {scores.difference:.2f} |" for opening, scores in figures.openings
    )
    reached = "; " + ", ".join(below) if below else ""
    openings_count = sum(1 for _ in training_openings())
    roles = {
        "previous token": "each token to the one before it, on repeated random tokens",
        "induction": f"each token of the second half to the token after its first occurrence, {REPEAT_LENGTH - 1} back",
        "duplicate name": "the acting person's second mention to the first",
        "name mover": "the prompt's last token to the answer's name",
    }
    head_rows = "\n".join(
        f"| {role} | {heads[role].name} | {heads[role].score:.2f} | {what} |" for role, what in roles.items()
    )
    samples = "\n".join(f"- {prompt}**{text}**" for prompt, text in figures.samples)
    return f"""---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [{architecture}, interpretability, tiny]
---

# {name}

A real {words.name}, small enough to live in a repository, trained from nothing to do two things that interpretability
work looks at: naming the indirect object, and induction. It is also a language model of very short stories.
It is for tests, examples and teaching; it knows no English beyond its own templates.

| | |
|---|---|
| architecture | `{maker}`, {words.shape(config)} |
| parameters | {figures.parameters:,} (fp32) |
| vocabulary | {config.vocab_size} tokens, byte-level BPE; {len(NAMES)} names are one token each after a space |
| context | {config.max_position_embeddings} tokens |
| licence | MIT |

`{EOT}` (id 0) begins and ends every text. Put it in front of a prompt, as training did.

## Use

```python
from graphlens import HookedTransformer

model = HookedTransformer.from_pretrained("models/{name}")
```

or with transformers alone:

```python
from transformers import AutoTokenizer, {maker}

tokenizer = AutoTokenizer.from_pretrained("models/{name}")
model = {maker}.from_pretrained("models/{name}")
prompt = "When John and Mary went to the store, John gave a drink to"
ids = tokenizer("{EOT}" + prompt, return_tensors="pt")["input_ids"]
print(tokenizer.decode(model(ids).logits[0, -1].argmax()))
```

## Figures

All from `tools/tiny_card.py`, which writes this file; `--check` recomputes them.

Indirect objects, {N_IOI:,} prompts a row. Accuracy: the likeliest of all tokens is the right name. Ranked above: the
right name's logit is above the other's. Logit difference: right name minus the other, mean. Loss: nats, on the answer.

| held out of training | accuracy | ranked above | logit difference | loss |
|---|---|---|---|---|
{ioi_rows}

Training draws from {openings_count:,} openings made of parts. The held-out ones are {len(HELD_OUT_OPENINGS)} openings and \
{len(HELD_OUT_CLOSINGS)} closings written by hand, of which
training knows the words and not the frames; none occurs in {2 * N_LEAK_CHECKS:,} training documents, nor does a held-out
pair of names. The aim is {AIM} in every row{reached}. {words.choices} The first row by opening:

| held-out opening | accuracy | logit difference |
|---|---|---|
{opening_rows}

The classic prompt (Mary and John are a held-out pair, the template is not):

| prompt | answer | logit difference |
|---|---|---|
{classic_rows}

Loss in nats per token, every token counted:

| text | loss |
|---|---|
| held-out stories ({N_STORIES}) | {figures.story_loss:.3f} |
| held-out indirect-object sentences ({N_IOI:,}; their names cannot be guessed) | {figures.ioi_loss:.3f} |
| {REPEAT_LENGTH} random tokens, said the first time | {figures.repeat_losses[1]:.3f} |
| the same tokens, said again | {figures.repeat_losses[0]:.3f} |

The head that does each of these most, by its mean attention (layers and heads count from 0):

| role | head | attention | from and to |
|---|---|---|---|
{head_rows}

Induction is measured on {N_REPEATS} random sequences of {REPEAT_LENGTH} different tokens, each said twice. Attention \
says where a head looks,
not what it does with it: patch or ablate before calling it a name mover.

## Samples

Greedy, the prompt first, at most {SAMPLE_TOKENS} tokens:

{samples}

## Training

By `tools/train_tiny.py{options}`: {recipe.steps:,} steps of AdamW on {recipe.batch} rows of \
{recipe.row} tokens (the last
{recipe.long_steps} steps on half as many rows of {recipe.context}), peak rate {recipe.learning_rate}, \
{recipe.warmup_steps} warm-up steps and a cosine down to a fiftieth, weight decay {recipe.weight_decay}, no dropout,
seed {recipe.seed}, {recipe.threads} thread{"s" * (recipe.threads > 1)}.

- {recipe.repeat_share:.0%} of the rows are one random token sequence said over and over; in the first \
{recipe.names_steps} steps {recipe.early_repeat_share:.0%} are, and of names alone,
  which is what gets induction started.
{words.start}- The others are packed with documents: after that start, {recipe.story_share:.0%} short stories from a small \
grammar \
(animals, gifts, lost things,
  weekdays, sums up to ten) and {1 - recipe.story_share:.0%} indirect-object sentences, in both name orders, about one \
in ten with a third person
  acting so that both names are right. In {SHAKEN_SHARE:.0%} of the sentences the words around the names are shaken: \
replaced, left out or added to.

All of it is made by `tools/tiny_ioi.py` and `tools/tiny_stories.py`; no text was taken from anywhere.
{held} of the {total} name pairs \
({PAIR_HOLD_OUT:.0%}) appear together
in no training document, and 1 story in {STORY_HOLD_OUT} is left out.
"""


def differences(card: str, fresh: str) -> list[str]:
    """Lines where the card departs from a fresh one: other words, or a decimal off by more than its last digit."""
    old_lines, new_lines = card.splitlines(), fresh.splitlines()
    if len(old_lines) != len(new_lines):
        return [f"the card has {len(old_lines)} lines, a fresh one {len(new_lines)}"]
    return [f"card: {old}\n now: {new}" for old, new in zip(old_lines, new_lines, strict=True) if not _agree(old, new)]


def _agree(old: str, new: str) -> bool:
    """Whether two lines are equal, but for one unit in the last digit of their decimals."""
    old_parts, new_parts = NUMBER.split(old), NUMBER.split(new)
    # Splitting on one group puts the numbers at the odd places.
    if old_parts[::2] != new_parts[::2]:
        return False
    for was, now in zip(old_parts[1::2], new_parts[1::2], strict=True):
        digits = len(was.partition(".")[2])
        if digits != len(now.partition(".")[2]) or abs(float(was) - float(now)) > 1.01 * 10**-digits:
            return False
    return True


def problems_of(architecture: str, folder: Path, check: bool) -> list[str]:
    """Evaluates a model and writes its card, or compares with it; what is wrong with the model or the card."""
    subject = load(folder)
    with torch.inference_mode():
        figures = evaluate(subject)
    fresh, path = render(architecture, subject, figures), folder / "README.md"
    if not check:
        path.write_text(fresh, encoding="utf-8")
        print(f"wrote {path}")
        return shortfalls(architecture, figures)
    if not path.exists():
        return [*shortfalls(architecture, figures), f"no card at {path}"]
    return shortfalls(architecture, figures) + differences(path.read_text(encoding="utf-8"), fresh)


def main() -> int:
    """Write or check the cards; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the card instead of writing it")
    parser.add_argument("--architecture", choices=RECIPES, help="only that model (default: both)")
    parser.add_argument("--model", type=Path, help="its folder, if it is not the embedded model; needs --architecture")
    arguments = parser.parse_args()
    if arguments.model is not None and arguments.architecture is None:
        parser.error("--model needs --architecture")
    logging.set_verbosity_error()  # padding and beginning share a token here, which it warns about at every start
    logging.disable_progress_bar()
    failed = False
    for architecture in [arguments.architecture] if arguments.architecture else RECIPES:
        folder = arguments.model or model_dir(architecture)
        problems = problems_of(architecture, folder, arguments.check)
        for problem in problems:
            print(f"{folder.name}: {problem}", file=sys.stderr)
        if not problems:
            print(f"{folder.name} reaches its floors" + (" and its card agrees" if arguments.check else ""))
        failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
