"""MMLU on the torch face: its subjects and questions, and how many of them a model answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch

from graphlens.errors import InputError
from graphlens.lens.hub import load_dataset
from graphlens.lens.tokenizing import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graphlens.model.torch_face import HookedTransformer

MMLU_ANSWER_LETTERS = ["A", "B", "C", "D"]
_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
    professional_law professional_medicine professional_psychology public_relations security_studies sociology
    us_foreign_policy virology world_religions
"""
MMLU_SUBJECTS = _SUBJECTS.split()


class Question(TypedDict):
    """A question of MMLU: its text, four choices, the number of the right one from 0, its subject."""

    question: str
    choices: list[str]
    answer: int
    subject: str


class Scores(TypedDict):
    """How many questions were answered with the right letter, of all and as a share of each subject's."""

    accuracy: float
    num_correct: int
    num_total: int
    subject_scores: dict[str, float]


def _subjects_of(subjects: str | Sequence[str] | None) -> list[str]:
    """The subjects that are asked for.

    Args:
        subjects: One, several, or None for all.

    Raises:
        InputError: For one that is none.
    """
    asked = MMLU_SUBJECTS if subjects is None else [subjects] if isinstance(subjects, str) else list(subjects)
    unknown = [subject for subject in asked if subject not in MMLU_SUBJECTS]
    if unknown:
        raise InputError(f"Invalid subject {unknown[0]!r}: MMLU has {', '.join(MMLU_SUBJECTS)}.")
    return asked


def _prompt_of(question: Question) -> str:
    """A question and its choices, up to where the answer's letter comes.

    Args:
        question: {"question": text, "choices": texts}.
    """
    choices = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip(MMLU_ANSWER_LETTERS, question["choices"], strict=False)
    )
    return f"Question: {question['question']}\nChoices:\n{choices}Answer:"


def make_mmlu_data_loader(
    subjects: str | Sequence[str] | None = None, split: str = "test", num_samples: int | None = None
) -> list[Question]:
    """Questions of MMLU (arXiv:2009.03300). It takes the package ``datasets``, and a connection the first time.

    Args:
        subjects: A name or names of MMLU_SUBJECTS; None for all.
        split: "test", "validation" or "dev".
        num_samples: The most questions of each subject; None for all.

    Returns:
        {"question", "choices", "answer" (0 to 3), "subject"} of each.

    Raises:
        InputError: For a subject that is none.
        RuntimeUnavailable: Without ``datasets``.
    """
    questions: list[Question] = []
    for subject in _subjects_of(subjects):
        rows = load_dataset("cais/mmlu", subject, split=split)
        kept = len(rows) if num_samples is None else min(num_samples, len(rows))
        for row in (rows[at] for at in range(kept)):
            found: Question = {
                "question": row["question"],
                "choices": row["choices"],
                "answer": row["answer"],
                "subject": subject,
            }
            questions.append(found)
    return questions


def mmlu_eval(
    model: HookedTransformer,
    tokenizer: PreTrainedTokenizerBase | None = None,
    subjects: str | Sequence[str] | None = None,
    split: str = "test",
    num_samples: int | None = None,
) -> Scores:
    """How many questions of MMLU a model answers with the right letter, without examples before them.

    Args:
        model: The model.
        tokenizer: A transformers tokenizer; None for the model's own.
        subjects: See make_mmlu_data_loader.
        split: See there.
        num_samples: See there.

    Returns:
        {"accuracy", "num_correct", "num_total", "subject_scores": {subject: accuracy}}.

    Raises:
        InputError: For no question at all.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    questions = make_mmlu_data_loader(subjects, split, num_samples)
    if not questions:
        raise InputError(f"MMLU has no question in split {split!r} of {subjects!r}.")
    letters = list(_letters(tokenizer))
    right: dict[str, list[bool]] = {}
    for question in questions:
        tokens = torch.tensor([tokenizer.encode(_prompt_of(question))])
        with torch.no_grad():
            scores = model(tokens, return_type="logits")[0, -1, letters[: len(question["choices"])]]
        right.setdefault(question["subject"], []).append(int(scores.argmax()) == question["answer"])
    correct = sum(map(sum, right.values()))
    return {
        "accuracy": correct / len(questions),
        "num_correct": correct,
        "num_total": len(questions),
        "subject_scores": {subject: sum(found) / len(found) for subject, found in right.items()},
    }


def _letters(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The token of each answer's letter: with a space before it where that is one token."""
    for letter in MMLU_ANSWER_LETTERS:
        ids = tokenizer.encode(f" {letter}", add_special_tokens=False)
        yield ids[0] if len(ids) == 1 else tokenizer.encode(letter, add_special_tokens=False)[0]
