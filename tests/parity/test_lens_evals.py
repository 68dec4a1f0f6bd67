"""Evaluations and SVDInterpreter beside TransformerLens 3.9's, on the embedded model."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import graphlens
from graphlens import GraphlensError
from graphlens.transformer_lens import SVDInterpreter, evals

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformer_lens
    from transformer_lens import evals as their_evals


@pytest.fixture(scope="module")
def words() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(graphlens.embedded_model())


@pytest.mark.filterwarnings("ignore:.*tokens were cut")  # the text is longer than this model's context
def test_the_sanity_check_is_the_same_number(model: Any, lens: Any) -> None:
    assert float(evals.sanity_check(model)) == pytest.approx(float(their_evals.sanity_check(lens)), abs=1e-4)


def test_the_induction_loss_is_that_of_the_same_tokens(model: Any, lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens draws from 20,000 ids, which this model has not: there it draws what graphlens draws."""
    draw = torch.randint
    monkeypatch.setattr(torch, "randint", lambda low, high, size: draw(0, lens.cfg.d_vocab, size))
    found = []
    for library, one in ((evals, model), (their_evals, lens)):
        for options in ({}, {"prepend_bos": False}):
            torch.manual_seed(2)
            found.append(float(library.induction_loss(one, subseq_len=20, batch_size=3, device="cpu", **options)))
    assert found[:2] == pytest.approx(found[2:], abs=1e-4)
    assert found[0] != found[1]


def test_draws_are_those_of_transformerlens_for_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        torch, "randint", lambda *arguments: asked.append(arguments) or torch.zeros(arguments[2], dtype=int)
    )
    evals.induction_loss(model, subseq_len=5)
    vocabulary = model.cfg.d_vocab
    assert asked == [(*((100, min(20000, vocabulary)) if vocabulary >= 1000 else (0, vocabulary)), (4, 5))]


def test_a_loss_over_batches_stops_where_transformerlens_stops(model: Any, lens: Any) -> None:
    batches = [{"tokens": torch.randint(0, model.cfg.d_vocab, (2, 7))} for _ in range(6)]
    for truncate in (2, 100):
        one = evals.evaluate_on_dataset(model, batches, truncate)
        assert one == pytest.approx(their_evals.evaluate_on_dataset(lens, batches, truncate, device="cpu"), abs=1e-4)
    assert evals.evaluate_on_dataset(model, batches, 2) != pytest.approx(
        evals.evaluate_on_dataset(model, batches), abs=1e-6
    )
    with pytest.raises(GraphlensError, match="no batch"):
        evals.evaluate_on_dataset(model, [])


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 4},
        {"seed": 5, "symmetric": True, "prepend_bos": False},
        {
            "seed": 6,
            "templates": ["[A] met [B]. [B] gave the [OBJECT] to [A]"],
            "names": ["John", "Mary", "Tom"],
            "nouns": {"OBJECT": ["ball", "book"]},
        },
    ],
)
def test_prompts_and_scores_are_those_of_transformerlens(
    options: dict[str, Any], model: Any, lens: Any, words: Any
) -> None:
    data = [library.IOIDataset(words, num_samples=20, **options) for library in (evals, their_evals)]
    assert len(data[0]) == len(data[1]) == 20
    assert data[0].samples == data[1].samples
    for one, other in zip(*(list(map(each.__getitem__, range(20))) for each in data), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    one = evals.ioi_eval(model, data[0], batch_size=7)
    other = their_evals.ioi_eval(lens, data[1], batch_size=8)
    assert one == pytest.approx(other, abs=1e-4)


def test_the_samples_of_a_model_itself(model: Any) -> None:
    """The model's own tokenizer will do."""
    found = evals.ioi_eval(model, num_samples=6)
    assert set(found) == {"Logit Difference", "Accuracy"}
    with pytest.raises(GraphlensError, match="two names"):
        evals.IOIDataset(model.tokenizer, names=["John"])


def test_mmlu_is_scored_as_transformerlens_scores_it(
    model: Any, lens: Any, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [
        {"question": f"How {thing}?", "choices": [f"{thing} {n}" for n in range(4)], "answer": n % 4, "extra": 0}
        for n, thing in enumerate(["John", "Mary", "store", "drink", "the"])
    ]
    for place in ("datasets.load_dataset", "transformer_lens.evals.load_dataset"):
        monkeypatch.setattr(place, lambda *_, **__: datasets.Dataset.from_list(rows))
    subjects = ["anatomy", "virology"]
    one = evals.mmlu_eval(model, words, subjects=subjects, num_samples=4)
    other = their_evals.mmlu_eval(lens, words, subjects=subjects, num_samples=4)
    assert one == other
    assert one["num_total"] == 8
    assert evals.make_mmlu_data_loader("anatomy") == their_evals.make_mmlu_data_loader("anatomy")
    assert evals.MMLU_SUBJECTS == their_evals.MMLU_SUBJECTS
    with pytest.raises(GraphlensError, match=r"Invalid subject .cooking.:"):
        evals.make_mmlu_data_loader("cooking")


def test_loaders_of_the_hub_give_transformerlens_rows(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    text = "When John and Mary went to the store, John gave a drink to Mary. " * 40
    asked: list[tuple[Any, ...]] = []

    def load(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return datasets.Dataset.from_dict({"text": [text] * 9, "content": [text] * 9})

    for place in ("datasets.load_dataset", "transformer_lens.evals.load_dataset"):
        monkeypatch.setattr(place, load)
    monkeypatch.setattr(
        "transformer_lens.utilities.tokenize_and_concatenate.__defaults__", (False, 1024, "text", True, None, True)
    )
    for one, other in zip(evals.DATASET_LOADERS, their_evals.DATASET_LOADERS, strict=True):
        assert one.__name__ == other.__name__
        first, second = (make(words, batch_size=2) for make in (one, other))
        assert asked[-2] == asked[-1]
        assert len(first) == len(second)
        assert torch.equal(first.dataset["tokens"][:], second.dataset["tokens"][:])


# Singular vectors


@pytest.mark.parametrize("processed", [False, True])
def test_singular_vectors_are_those_of_transformerlens(processed: bool) -> None:
    from lens_oracle import PROCESSING, oracle

    lens = oracle(graphlens.embedded_model(), **dict.fromkeys(PROCESSING, processed))
    name = "from_pretrained" if processed else "from_pretrained_no_processing"
    model = getattr(graphlens.transformer_lens.HookedTransformer, name)("tiny-gpt2")
    one, other = SVDInterpreter(model), transformer_lens.SVDInterpreter(lens)
    for arguments in (("OV", 1, 5, 2), ("OV", 0, 3, 0), ("w_in", 2, 6), ("w_in", 0), ("w_out", 3, 4), ("w_out", 1)):
        ours, theirs = one.get_singular_vectors(*arguments), other.get_singular_vectors(*arguments)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        # The sign of a singular vector is free.
        signs = torch.sign((ours * theirs).sum(0))
        torch.testing.assert_close(ours * signs, theirs, rtol=0, atol=2e-4)
    assert set(one.params) >= {"unembed.W_U", "blocks.0.attn.W_V"}


def test_singular_vectors_on_the_numpy_face(tiny: Any, model: Any) -> None:
    found = SVDInterpreter(tiny).get_singular_vectors("w_in", 1)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, SVDInterpreter(model).get_singular_vectors("w_in", 1).numpy())


@pytest.mark.parametrize(
    "arguments",
    [("OV", 0), ("OV", 0, 10, 99), ("OV", 9, 10, 0), ("w_in", 99), ("w_out", -1), ("qk", 0), ("w_in", 0, 5000)],
)
def test_vectors_that_are_not_there_are_refused(arguments: tuple[Any, ...], model: Any, lens: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017  # an assertion, a ValueError or an IndexError
        transformer_lens.SVDInterpreter(lens).get_singular_vectors(*arguments)
    with pytest.raises(GraphlensError):
        SVDInterpreter(model).get_singular_vectors(*arguments)
