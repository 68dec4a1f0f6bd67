"""Evaluate the embedded tiny GPT-2 and write its model card, or check the card that is there.

    python tools/tiny_gpt2_card.py            # evaluate, write models/tiny-gpt2/README.md
    python tools/tiny_gpt2_card.py --check    # evaluate, exit 1 where the card says something else

Every figure on the card comes from this run, on data that ``tiny_gpt2_ioi`` and ``tiny_gpt2_stories`` keep out of
training; that they do is checked here too. Needs torch and transformers; takes seconds on a CPU.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_gpt2_ioi import (
    HELD_OUT_CLOSINGS,
    HELD_OUT_OPENINGS,
    SHAKEN_SHARE,
    IoiExample,
    classic_prompts,
    ioi_document,
    leaks,
    sample_ioi,
    training_openings,
)
from tiny_gpt2_stories import STORY_HOLD_OUT, sample_story
from tiny_gpt2_words import EOT, NAMES, PAIR_HOLD_OUT, Split, name_pairs
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_tiny_gpt2 import MODEL_DIR, Recipe
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

EVAL_SEED = 1234
N_IOI = 1000
N_STORIES = 256
N_REPEATS = 64
REPEAT_LENGTH = 50
N_LEAK_CHECKS = 20_000
SAMPLE_TOKENS = 40
SAMPLE_PROMPTS = (
    "One day Alice went to the park with her small",
    "Today Tom had two apples. Then he found three more. Now he had",
    "On Tuesday Lucy went to the lake. The next day was",
    "Last night Ben put the blue key in the bag. Then he went to the farm. Later he wanted the key.",
)

# What the card may not fall below, whatever the training run.
MIN_ACCURACY = 0.98
MIN_LOGIT_DIFFERENCE = 3.0
MIN_INDUCTION = 0.7

NUMBER = re.compile(r"(-?\d+\.\d+)")


@dataclass(frozen=True)
class Subject:
    """The model under evaluation, with eager attention so that it returns its patterns, and its tokenizer."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str) -> list[int]:
        """Ids of the text with the beginning-of-text token in front, as every training document has it."""
        ids: list[int] = self.tokenizer(EOT + text)["input_ids"]
        return ids

    def token(self, word: str) -> int:
        """The id of a word that is one token after a space."""
        (token,) = self.tokenizer(" " + word)["input_ids"]
        return int(token)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids."""
        return str(self.tokenizer.decode(ids))


@dataclass(frozen=True)
class IoiScores:
    """Scores over a set of indirect-object prompts; logit difference is right name minus wrong name."""

    top: float  # share of prompts whose likeliest next token, of all tokens, is the right name
    above: float  # share where the right name's logit is above the wrong name's
    difference: float  # mean logit difference
    answer_loss: float  # mean loss on the answer, nats


@dataclass(frozen=True)
class Head:
    """The head that does one thing most: its name, as L<layer>H<head>, and its mean attention there."""

    name: str
    score: float


@dataclass(frozen=True)
class Figures:
    """All that the card reports."""

    parameters: int
    both: IoiScores
    new_names: IoiScores
    new_templates: IoiScores
    new_openings: IoiScores
    openings: list[tuple[str, IoiScores]]  # each held-out opening
    classic: list[tuple[IoiExample, str, float]]  # example, likeliest next token, logit difference
    leaks: list[str]  # what training documents hold that they may not
    ioi_loss: float  # nats per token
    story_loss: float  # nats per token
    repeat_losses: tuple[float, float]  # nats per token, second time and first time
    heads: dict[str, Head]
    samples: list[tuple[str, str]]


def load(folder: Path) -> Subject:
    """The model and tokenizer in ``folder``, ready to evaluate."""
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    return Subject(model, AutoTokenizer.from_pretrained(folder))


def pad(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows as one tensor [batch, longest row], filled on the right, which causal attention never looks at."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def text_loss(subject: Subject, texts: Sequence[str]) -> float:
    """Mean loss in nats per token over all tokens of the texts after the first, cut at the context length."""
    rows = [subject.encode(text)[: subject.model.config.n_positions] for text in texts]
    ids = pad(rows, 0)
    labels = pad(rows, -100)
    logits = subject.model(ids).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100))


def final_logits(subject: Subject, examples: Sequence[IoiExample]) -> Tensor:
    """Logits [example, vocab] after each prompt's last token."""
    rows = [subject.encode(example.prompt) for example in examples]
    ends = torch.tensor([len(row) - 1 for row in rows])
    logits: Tensor = subject.model(pad(rows, 0)).logits
    return logits[torch.arange(len(rows)), ends]


def score_ioi(subject: Subject, examples: Sequence[IoiExample]) -> IoiScores:
    """Score the prompts against their answers."""
    logits = final_logits(subject, examples)
    right = torch.tensor([subject.token(example.io) for example in examples])
    wrong = torch.tensor([subject.token(example.s) for example in examples])
    each = torch.arange(len(examples))
    differences = logits[each, right] - logits[each, wrong]
    return IoiScores(
        top=(logits.argmax(-1) == right).float().mean().item(),
        above=(differences > 0).float().mean().item(),
        difference=differences.mean().item(),
        answer_loss=cross_entropy(logits, right).item(),
    )


def classic_answers(subject: Subject) -> list[tuple[IoiExample, str, float]]:
    """Each classic prompt with the likeliest next token and the logit difference."""
    examples = classic_prompts()
    logits = final_logits(subject, examples)
    return [
        (
            example,
            subject.decode([int(row.argmax())]),
            (row[subject.token(example.io)] - row[subject.token(example.s)]).item(),
        )
        for example, row in zip(examples, logits, strict=True)
    ]


def best_head(scores: Tensor) -> Head:
    """The head with the highest of scores [layer, head]."""
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return Head(f"L{layer}H{head}", scores[layer, head].item())


def repeat_figures(subject: Subject, rng: random.Random) -> tuple[tuple[float, float], dict[str, Head]]:
    """Losses on the second and first saying of random sequences, and the heads that make the difference.

    A row is the beginning token, then ``REPEAT_LENGTH`` different random tokens twice. The induction score of a head
    is its mean attention from each token of the second half to the token after its first occurrence, which lies
    ``REPEAT_LENGTH - 1`` back; the previous-token score, from every token after the beginning to the one before it.
    """
    tokens = range(1, subject.model.config.vocab_size)
    ids = torch.tensor([[0, *sample_repeated(rng, tokens, REPEAT_LENGTH)] for _ in range(N_REPEATS)])
    output = subject.model(ids, output_attentions=True)
    losses = cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    first, second = losses[:, :REPEAT_LENGTH].mean().item(), losses[:, REPEAT_LENGTH + 1 :].mean().item()
    patterns = torch.stack(output.attentions)  # [layer, batch, head, query, key]
    queries = torch.arange(REPEAT_LENGTH + 1, 2 * REPEAT_LENGTH + 1)
    induction = patterns[..., queries, queries - (REPEAT_LENGTH - 1)].mean((1, 3))
    previous = patterns.diagonal(offset=-1, dim1=-2, dim2=-1).mean((1, 3))
    return (second, first), {"previous token": best_head(previous), "induction": best_head(induction)}


def sample_repeated(rng: random.Random, token_ids: Sequence[int], length: int) -> list[int]:
    """``length`` different tokens drawn from ``token_ids``, said twice: ``2 * length`` ids."""
    half = rng.sample(token_ids, length)
    return half + half


def name_heads(subject: Subject, examples: Sequence[IoiExample]) -> dict[str, Head]:
    """The heads that, on indirect-object prompts, find the repeated name and fetch the answer.

    Duplicate name: mean attention from the acting name's second mention to its first. Name mover: mean attention from
    the last token to the answer's name.
    """
    rows = [subject.encode(example.prompt) for example in examples]
    patterns = torch.stack(subject.model(pad(rows, 0), output_attentions=True).attentions)
    duplicate, mover = [], []
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        s = subject.token(example.s)
        first, second = (at for at, token in enumerate(row) if token == s)
        duplicate.append(patterns[:, i, :, second, first])
        mover.append(patterns[:, i, :, len(row) - 1, row.index(subject.token(example.io))])
    return {
        "duplicate name": best_head(torch.stack(duplicate).mean(0)),
        "name mover": best_head(torch.stack(mover).mean(0)),
    }


def continue_greedily(subject: Subject, prompt: str) -> str:
    """The likeliest continuation, token by token, up to the end token or ``SAMPLE_TOKENS`` tokens."""
    ids = subject.encode(prompt)
    start = len(ids)
    while len(ids) < start + SAMPLE_TOKENS:
        token = int(subject.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == 0:
            break
        ids.append(token)
    return subject.decode(ids[start:])


def evaluate(subject: Subject) -> Figures:
    """Compute every figure, from ``EVAL_SEED`` alone."""
    rng = random.Random(EVAL_SEED)

    def prompts(pairs: Split, openings: Split, closings: Split) -> list[IoiExample]:
        return [sample_ioi(rng, pairs, openings, closings) for _ in range(N_IOI)]

    both = prompts("held_out", "held_out", "held_out")
    new_names = prompts("held_out", "train", "train")
    new_templates = prompts("train", "held_out", "held_out")
    new_openings = prompts("held_out", "held_out", "train")
    stories = [sample_story(rng, "held_out") for _ in range(N_STORIES)]
    repeat_losses, heads = repeat_figures(subject, rng)
    by_opening = [(opening, [e for e in both if e.opening == opening]) for opening in HELD_OUT_OPENINGS]
    documents = (make(rng) for _ in range(N_LEAK_CHECKS) for make in (ioi_document, sample_story))
    return Figures(
        parameters=subject.model.num_parameters(),
        both=score_ioi(subject, both),
        new_names=score_ioi(subject, new_names),
        new_templates=score_ioi(subject, new_templates),
        new_openings=score_ioi(subject, new_openings),
        openings=[(opening, score_ioi(subject, examples)) for opening, examples in by_opening],
        classic=classic_answers(subject),
        leaks=[found for document in documents for found in leaks(document)],
        ioi_loss=text_loss(subject, [f"{example.prompt} {example.io}." for example in both]),
        story_loss=text_loss(subject, stories),
        repeat_losses=repeat_losses,
        heads={**heads, **name_heads(subject, both)},
        samples=[(prompt, continue_greedily(subject, prompt)) for prompt in SAMPLE_PROMPTS],
    )


def shortfalls(figures: Figures) -> list[str]:
    """What falls below the floors above, in words."""
    found = []
    for name, scores, least in (
        ("held-out names and templates", figures.both, MIN_ACCURACY),
        ("held-out names", figures.new_names, MIN_ACCURACY),
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


def render(subject: Subject, figures: Figures) -> str:
    """The model card, as Markdown."""
    config, recipe, heads = subject.model.config, Recipe(), figures.heads
    held, total = len(name_pairs("held_out")), len(NAMES) * (len(NAMES) - 1) // 2
    ioi_rows = "\n".join(
        (
            _ioi_row("name pair and template (whole opening and whole closing)", figures.both),
            _ioi_row("name pair only", figures.new_names),
            _ioi_row("template only", figures.new_templates),
            _ioi_row("name pair and opening", figures.new_openings),
        )
    )
    classic_rows = "\n".join(
        f"| {example.prompt} | `{token}` | {difference:.2f} |" for example, token, difference in figures.classic
    )
    opening_rows = "\n".join(
        f"| {opening} | {scores.top:.3f} | {scores.difference:.2f} |" for opening, scores in figures.openings
    )
    reached = "" if figures.both.top >= MIN_ACCURACY else f"; unseen frames are at {figures.both.top:.3f}"
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
tags: [gpt2, interpretability, tiny]
---

# tiny-gpt2

A real GPT-2, small enough to live in a repository, trained from nothing to do two things that interpretability
work looks at: naming the indirect object, and induction. It is also a language model of very short stories.
It is for tests, examples and teaching; it knows no English beyond its own templates.

| | |
|---|---|
| architecture | `GPT2LMHeadModel`, {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, \
MLP {config.n_inner}, `{config.activation_function}`, tied embeddings |
| parameters | {figures.parameters:,} (fp32) |
| vocabulary | {config.vocab_size} tokens, byte-level BPE; {len(NAMES)} names are one token each after a space |
| context | {config.n_positions} tokens |
| licence | MIT |

`{EOT}` (id 0) begins and ends every text. Put it in front of a prompt, as training did.

## Use

```python
from graphlens import HookedTransformer

model = HookedTransformer.from_pretrained("models/tiny-gpt2")
```

or with transformers alone:

```python
from transformers import AutoTokenizer, GPT2LMHeadModel

tokenizer = AutoTokenizer.from_pretrained("models/tiny-gpt2")
model = GPT2LMHeadModel.from_pretrained("models/tiny-gpt2")
prompt = "When John and Mary went to the store, John gave a drink to"
ids = tokenizer("{EOT}" + prompt, return_tensors="pt")["input_ids"]
print(tokenizer.decode(model(ids).logits[0, -1].argmax()))
```

## Figures

All from `tools/tiny_gpt2_card.py`, which writes this file; `--check` recomputes them.

Indirect objects, {N_IOI:,} prompts a row. Accuracy: the likeliest of all tokens is the right name. Ranked above: the
right name's logit is above the other's. Logit difference: right name minus the other, mean. Loss: nats, on the answer.

| held out of training | accuracy | ranked above | logit difference | loss |
|---|---|---|---|---|
{ioi_rows}

Training draws from {openings_count:,} openings made of parts. The held-out ones are {len(HELD_OUT_OPENINGS)} openings and \
{len(HELD_OUT_CLOSINGS)} closings written by hand, of which
training knows the words and not the frames; none occurs in {2 * N_LEAK_CHECKS:,} training documents, nor does a held-out
pair of names. The aim is {MIN_ACCURACY} in every row{reached}. Two choices were made after seeing such rows: the
seed is the better of two in an earlier training on one thread (the other's names alone were at 0.96), and a still earlier
model's mistakes led to more varied training closings; the held-out frames were not touched. The first row by opening:

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

By `tools/train_tiny_gpt2.py` with its defaults: {recipe.steps:,} steps of AdamW on {recipe.batch} rows of \
{recipe.row} tokens (the last
{recipe.long_steps} steps on half as many rows of {recipe.context}), peak rate {recipe.learning_rate}, \
{recipe.warmup_steps} warm-up steps and a cosine down to a fiftieth, weight decay {recipe.weight_decay}, no dropout,
seed {recipe.seed}, {recipe.threads} threads.

- {recipe.repeat_share:.0%} of the rows are one random token sequence said over and over; in the first \
{recipe.names_steps} steps {recipe.early_repeat_share:.0%} are, and of names alone,
  which is what gets induction started.
- The others are packed with documents: after that start, {recipe.story_share:.0%} short stories from a small grammar \
(animals, gifts, lost things,
  weekdays, sums up to ten) and {1 - recipe.story_share:.0%} indirect-object sentences, in both name orders, about one \
in ten with a third person
  acting so that both names are right. In {SHAKEN_SHARE:.0%} of the sentences the words around the names are shaken: \
replaced, left out or added to.

All of it is made by `tools/tiny_gpt2_ioi.py` and `tools/tiny_gpt2_stories.py`; no text was taken from anywhere.
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


def main() -> int:
    """Write or check the card; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the card instead of writing it")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="model folder (default: models/tiny-gpt2)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()  # padding and beginning share a token here, which it warns about at every start
    logging.disable_progress_bar()
    subject = load(arguments.model)
    with torch.inference_mode():
        figures = evaluate(subject)
    fresh = render(subject, figures)
    path: Path = arguments.model / "README.md"
    problems = shortfalls(figures)
    if arguments.check:
        problems += differences(path.read_text(encoding="utf-8"), fresh) if path.exists() else [f"no card at {path}"]
    else:
        path.write_text(fresh, encoding="utf-8")
        print(f"wrote {path}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print("the model reaches its floors" + (" and the card agrees" if arguments.check else ""))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
