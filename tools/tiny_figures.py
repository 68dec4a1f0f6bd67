"""What an embedded model can do, in figures, on data that its training never sees.

``tiny_ioi`` and ``tiny_stories`` keep that data out of training; that they do is checked here too. Needs torch and
transformers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_ioi import HELD_OUT_OPENINGS, IoiExample, classic_prompts, ioi_document, leaks, sample_ioi
from tiny_stories import sample_story
from tiny_words import EOT, Split
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class Subject:
    """The model under evaluation, with eager attention so that it returns its patterns, and its tokenizer."""

    model: PreTrainedModel
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
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return Subject(model, AutoTokenizer.from_pretrained(folder))


def pad(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows as one tensor [batch, longest row], filled on the right, which causal attention never looks at."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def text_loss(subject: Subject, texts: Sequence[str]) -> float:
    """Mean loss in nats per token over all tokens of the texts after the first, cut at the context length."""
    rows = [subject.encode(text)[: subject.model.config.max_position_embeddings] for text in texts]
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
