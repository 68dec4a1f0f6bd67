"""Directions, means and probes of a harvest are what NumPy makes of its arrays; documents stay whole; sweeps take means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import Harvest, HookedTransformer, InputError, Patch, Steer, harvest, sweep
from graphlens.analysis.harvest_labels import Record, records
from graphlens.attribution import attribution_patch
from graphlens.metrics import LogitDiff
from graphlens.patching import HarvestMean, Site, sweep_pairs
from tests.scale.harvests import LAST, rows

Z = "blocks.1.attn.hook_z"
COUNT = 40
ROWS = rows(COUNT)  # the fourth is empty
LABELS = np.asarray([bool(row and row[0] % 2) for row in ROWS])


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


@pytest.fixture(scope="module")
def made(model: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    """Documents end in the midst of shards, and some go over two rows."""
    out = tmp_path_factory.mktemp("probed") / "h"
    found = harvest(model, ROWS, [LAST, Z], out, context=37, batch_tokens=100, shard_tokens=173, verbose=False)
    assert len(found.plan.shards) > 4
    return found


# Labels


def test_labels_in_every_form_say_the_same(made: Harvest) -> None:
    import torch

    wanted = made.direction(LABELS, LAST)
    of_tokens = LABELS[made.documents[:]]
    first = {number: row[0] for number, row in enumerate(ROWS) if row}

    def says(record: Record) -> bool:
        assert record.tokens.tolist() == ROWS[record.document]
        return first[record.document] % 2 == 1

    given: list[tuple[Any, str]] = [
        (LABELS.tolist(), "document"),
        (LABELS.astype(np.int64), "document"),
        (torch.tensor(LABELS), "document"),
        ({number: bool(label) for number, label in enumerate(LABELS)}, "document"),
        (says, "document"),
        (of_tokens, "token"),
        (dict(enumerate(of_tokens.tolist())), "token"),
        (lambda record: np.full(len(record.tokens), says(record)), "token"),
    ]
    for labels, by in given:
        assert np.array_equal(made.direction(labels, LAST, by=by), wanted)


def test_what_has_no_label_is_left_out(made: Harvest) -> None:
    documents = made.documents[:]
    some: list[Any] = [None if number % 3 == 0 else bool(label) for number, label in enumerate(LABELS)]
    kept = documents % 3 != 0
    values = made[LAST][:].astype(np.float64)
    wanted = values[kept & LABELS[documents]].mean(0) - values[kept & ~LABELS[documents]].mean(0)
    np.testing.assert_allclose(made.direction(some, LAST), wanted, atol=1e-6)
    by_number = {number: label for number, label in enumerate(some) if label is not None}
    assert np.array_equal(made.direction(by_number, LAST), made.direction(some, LAST))
    assert np.array_equal(made.direction(lambda record: some[record.document], LAST), made.direction(some, LAST))
    by_token = made.direction(
        lambda record: None if record.document % 3 == 0 else record.tokens > 400, LAST, by="token"
    )
    large = made.tokens[:] > 400
    wanted = values[kept & large].mean(0) - values[kept & ~large].mean(0)
    np.testing.assert_allclose(by_token, wanted, atol=1e-6)


def test_a_record_is_a_whole_document(made: Harvest) -> None:
    seen = dict(records(made))
    assert [record.tokens.tolist() for record in seen.values()] == [row for row in ROWS if row]
    for start, record in seen.items():
        assert np.array_equal(made.positions[start : start + len(record.tokens)], record.positions)
        assert made.documents[start] == record.document


def test_padding_of_several_documents_has_no_label(model: HookedTransformer, tmp_path: Path) -> None:
    given = [[5, 6, 7], [8, 9], [10, 11, 12], [13]]
    found = harvest(model, given, LAST, tmp_path / "h", context=7, pack=True, keep_pad=True, verbose=False)
    documents = found.documents[:]
    assert (documents == -1).sum() == 5
    values = found[LAST][:].astype(np.float64)
    labels = np.asarray([True, False, False, True])  # -1 would be the last one's
    wanted = values[np.isin(documents, [0, 3])].mean(0) - values[np.isin(documents, [1, 2])].mean(0)
    np.testing.assert_allclose(found.direction(labels, LAST), wanted, atol=1e-5)
    np.testing.assert_allclose(found.direction(lambda record: bool(labels[record.document]), LAST), wanted, atol=1e-5)
    by_token = np.isin(documents, [0, 3, -1])
    np.testing.assert_allclose(found.direction(by_token, LAST, by="token"), wanted, atol=1e-5)
    assert [record.document for _, record in records(found)] == [0, 1, 2, 3]
    assert found.probe(labels, LAST, test=0.5).held_out.documents == 2


def test_a_direction_of_length_1(made: Harvest) -> None:
    plain, unit = made.direction(LABELS, Z), made.direction(LABELS, Z, unit=True)
    assert unit.shape == plain.shape == made[Z].shape[1:]
    np.testing.assert_allclose(unit * np.linalg.norm(plain), plain, atol=1e-6)


# Means


def test_means_are_numpys(model: HookedTransformer, made: Harvest, tmp_path: Path) -> None:
    values, positions = made[Z][:].astype(np.float64), made.positions[:]
    np.testing.assert_allclose(made.mean(Z), values.mean(0), atol=1e-6)
    found = made.mean(Z, by="position")
    assert found.shape == (37, *values.shape[1:])
    for place in range(37):
        np.testing.assert_allclose(found[place], values[positions == place].mean(0), atol=1e-6)
    of_true = LABELS[made.documents[:]]
    np.testing.assert_allclose(made.mean(Z, LABELS), values[of_true].mean(0), atol=1e-6)
    assert np.array_equal(made.mean(Z, of_true, by="token"), made.mean(Z, LABELS))
    np.testing.assert_allclose(made.mean(Z, LABELS) - made.mean(Z, ~LABELS), made.direction(LABELS, Z), atol=1e-6)
    reduced = harvest(model, ROWS, Z, tmp_path / "r", context=37, reduce="variance", verbose=False)
    np.testing.assert_allclose(reduced.mean(Z), made.mean(Z), atol=1e-6)
    with pytest.raises(InputError, match="statistics alone"):
        reduced.mean(Z, by="position")


def test_a_position_without_tokens_has_no_mean(model: HookedTransformer, tmp_path: Path) -> None:
    found = harvest(model, ROWS, LAST, tmp_path / "h", prepend_bos=True, keep_bos=False, verbose=False)
    means = found.mean(LAST, by="position")
    assert np.isnan(means[0]).all()
    assert np.isfinite(means[1:]).all()


TEXTS = [
    "When John and Mary went to the store, John gave a drink to",
    "Mary and Tom went to the",
    "Tom gave Anna a ball",
]
METRIC = LogitDiff(" Mary", " John", reduction="none")
LINEAR = LogitDiff(" Mary", " John")
SITES = [Site("z", 1, head=2), Site("resid_post", 3, position=-1), Site("z", 1)]


@pytest.fixture(scope="module")
def of_texts(model: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    texts = [*TEXTS, "Anna and John went to the park, Anna gave a ball to Tom. John went home"]
    return harvest(model, texts, [LAST, Z], tmp_path_factory.mktemp("texts") / "h", shard_tokens=20, verbose=False)


@pytest.mark.parametrize("by", [None, "position"])
def test_a_sweep_with_its_means_is_one_with_means_of_a_cache(
    model: HookedTransformer, of_texts: Harvest, by: str | None
) -> None:
    text = TEXTS[0]
    tokens = model.to_tokens(text)
    caches = [
        model.run_with_cache(of_texts.tokens[of_texts.documents[:] == number][None], names_filter=[LAST, Z])[1]
        for number in range(4)
    ]
    means = {}
    for hook in (LAST, Z):
        each = [cache[hook][0] for cache in caches]
        if by is None:
            mean = np.concatenate(each).mean(0)[None]
        else:
            places = range(tokens.shape[1])
            mean = np.stack([np.mean([rows[place] for rows in each if len(rows) > place], 0) for place in places])
        means[hook] = np.broadcast_to(mean, (tokens.shape[1], *mean.shape[1:]))[None]
    ours = sweep(model, text, SITES, HarvestMean(of_texts, by), METRIC, verbose=False)
    theirs = sweep(model, text, SITES, means, METRIC, verbose=False)
    np.testing.assert_allclose(ours.values, theirs.values, atol=2e-5)
    assert np.abs(ours.values - ours.against("corrupted")).max() > 0.1  # it does something
    estimates = [attribution_patch(model, text, SITES, source, LINEAR) for source in (HarvestMean(of_texts, by), means)]
    np.testing.assert_allclose(estimates[0].values, estimates[1].values, atol=2e-5)
    patched = of_texts.mean(Z, by=by) if by is None else of_texts.mean(Z, by=by)[: tokens.shape[1]]
    logits = model.run_with_interventions(text, Patch(Z, patched))
    np.testing.assert_allclose(ours.values[2], METRIC.bound(model.to_single_token)(logits), atol=2e-5)


@pytest.mark.parametrize("by", [None, "position"])
def test_its_means_are_the_same_for_one_text_and_many(
    model: HookedTransformer, of_texts: Harvest, by: str | None
) -> None:
    """Padding on the left moves no text's positions; batches of pairs have one mean."""
    source = HarvestMean(of_texts, by)
    alone = [sweep(model, text, SITES, source, METRIC, verbose=False).values[:, 0] for text in TEXTS]
    together = sweep(model, TEXTS, SITES, source, METRIC, verbose=False)
    np.testing.assert_allclose(together.values, np.stack(alone, 1), atol=5e-5)
    pairs = sweep_pairs(
        model, TEXTS, TEXTS, SITES, METRIC, source=source, batch_size=1, per_example=True, verbose=False
    )
    assert pairs.examples is not None
    np.testing.assert_allclose(pairs.examples.values, np.stack(alone, 1), atol=5e-5)


def test_means_that_do_not_fit_are_refused(model: HookedTransformer, of_texts: Harvest, tmp_path: Path) -> None:
    def refused(source: Any, text: str = TEXTS[0], site: Site = SITES[0]) -> str:
        with pytest.raises(InputError) as caught:
            sweep(model, text, site, source, METRIC, verbose=False)
        return str(caught.value)

    assert "give its means, HarvestMean(harvest)" in refused(of_texts)
    assert "was not harvested" in refused(HarvestMean(of_texts), site=Site("z", 0))
    longer = TEXTS[0] + " Mary. " + TEXTS[0]
    assert "has no mean for each of" in refused(HarvestMean(of_texts, "position"), longer)
    processed = HookedTransformer.from_pretrained("tiny-gpt2")
    with pytest.raises(InputError, match="this harvest was made by a model with other weight processing"):
        sweep(processed, TEXTS[0], SITES[0], HarvestMean(of_texts), METRIC, verbose=False)
    with pytest.raises(InputError, match=r"the harvest holds \[4, 32\] for each token, and this model gives \[5, 7\]"):
        HarvestMean(of_texts).value(Z, np.zeros((1, 3, 5, 7), np.float32), None)
    with pytest.raises(InputError, match=r"takes a graphlens\.Harvest, not dict"):
        HarvestMean({})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="all tokens"):
        HarvestMean(of_texts, "layer")
    with pytest.raises(InputError, match="a 'document' or a 'token'"):
        of_texts.mean(Z, [True, False, True, True], by="position")


def test_means_of_another_model_are_warned_of(of_texts: Harvest) -> None:
    other = HookedTransformer.from_pretrained_no_processing("tiny-llama")  # of the same shapes
    with pytest.warns(UserWarning, match="the means are of tiny-gpt2's activations, and this model is tiny-llama"):
        sweep(other, other.to_tokens(TEXTS[0]), Site("z", 1), HarvestMean(of_texts), METRIC, verbose=False)


# Probes


@pytest.mark.parametrize("kind", ["logistic", "ridge", "mean"])
def test_a_probe_is_of_the_documents_that_are_not_held_out(made: Harvest, kind: str) -> None:
    found = made.probe(LABELS, Z, kind=kind, l2=0.05, test=0.3, seed=4)
    documents, held_out = made.documents[:], found.test_documents
    values = made[Z][:].reshape(len(made), -1).astype(np.float64)
    labels, mine = LABELS[documents], ~held_out[documents]
    for score, chosen in ((found.held_out, ~mine), (found.training, mine)):
        said = values[chosen] @ found.direction.ravel() + found.bias
        assert score.accuracy == np.mean((said > 0) == labels[chosen])
        assert score.tokens == chosen.sum()
        assert score.documents == len(np.unique(documents[chosen]))
        pairs = np.mean(said[labels[chosen]][:, None] > said[~labels[chosen]])
        assert score.auc == pytest.approx(pairs, abs=1e-9)
    assert (found.accuracy, found.auc) == (found.held_out.accuracy, found.held_out.auc)
    # The weights, from the training tokens alone.
    x, y = values[mine], np.where(labels[mine], 1.0, -1.0)
    if kind == "mean":
        true, false = x[y > 0].mean(0), x[y < 0].mean(0)
        np.testing.assert_allclose(found.direction.ravel(), true - false, atol=1e-6)
        assert abs(found.bias + (true - false) @ (true + false) / 2) < 1e-6
        return
    z = (x - x.mean(0)) / x.std(0)
    weights, bias = found.direction.ravel() * x.std(0), found.bias + found.direction.ravel() @ x.mean(0)
    numbers = z @ weights + bias
    slope = -y / (1 + np.exp(y * numbers)) if kind == "logistic" else numbers - y
    np.testing.assert_allclose(z.T @ slope / len(z) + 0.05 * weights, 0, atol=1e-6)
    assert abs(slope.mean()) < 1e-6


def test_whole_documents_and_groups_are_held_out(made: Harvest) -> None:
    found = made.probe(LABELS, LAST, test=0.25, kind="mean")
    has = np.asarray([bool(row) for row in ROWS])
    for kind in (True, False):
        of = has & (LABELS if kind else ~LABELS)
        assert (found.test_documents & of).sum() == round(0.25 * of.sum())
    assert np.array_equal(made.probe(LABELS, LAST, test=0.25, kind="ridge").test_documents, found.test_documents)
    assert not np.array_equal(made.probe(LABELS, LAST, test=0.25, seed=1).test_documents, found.test_documents)
    groups = np.arange(COUNT) // 4
    together = made.probe(LABELS, LAST, groups=groups, test=0.4, kind="mean")
    for group in np.unique(groups):
        assert len(np.unique(together.test_documents[groups == group])) == 1
    named = made.probe(LABELS, LAST, groups=[f"g{group}" for group in groups], test=0.4, kind="mean")
    assert named.test_documents.sum() > 0
    wide = together.held_out.accuracy_interval
    every = made.probe(LABELS, LAST, test=0.4, kind="mean").held_out.accuracy_interval
    assert wide[1] - wide[0] > every[1] - every[0]  # ten groups tell less than forty documents


def test_a_probe_of_tokens_holds_out_documents_too(made: Harvest) -> None:
    def large(record: Record) -> Any:
        return record.tokens > 400

    found = made.probe(large, LAST, by="token", kind="ridge")
    again = made.probe(made.tokens[:] > 400, LAST, by="token", kind="ridge")
    assert np.array_equal(found.direction, again.direction)
    assert found.held_out == again.held_out
    test = found.test_documents[made.documents[:]]
    assert found.held_out.tokens == test.sum()
    right = found.predict(made[LAST][:]) == (made.tokens[:] > 400)
    assert found.accuracy == right[test].mean()
    assert found.accuracy > found.held_out.majority + 0.1


def test_a_probe_scores_another_harvest(made: Harvest) -> None:
    found = made.probe(LABELS, LAST, seed=2)
    held_out = {int(number): bool(LABELS[number]) for number in np.flatnonzero(found.test_documents)}
    assert found.score(made, held_out) == found.held_out
    with pytest.raises(InputError, match="has the label False"):
        found.score(made, {0: True})


def test_a_harvest_is_never_held_whole(
    model: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    monkeypatch.setattr("graphlens.analysis.harvest_means.PIECE_BYTES", 300_000)
    random = np.random.default_rng(0)
    ids = random.integers(0, 800, (200, 100))
    found = harvest(model, ids, "hook_embed", tmp_path / "h", shard_tokens=4500, verbose=False)
    whole = 20_000 * 128 * 4
    labels = random.random(200) < 0.5
    jobs = {
        "mean": lambda: found.mean("hook_embed", by="position"),
        "direction": lambda: found.direction(labels, "hook_embed"),
        "function": lambda: found.direction(lambda record: record.tokens > 400, "hook_embed", by="token"),
        "ridge": lambda: found.probe(labels, "hook_embed", kind="ridge"),
        "logistic": lambda: found.probe(lambda record: record.tokens > 400, "hook_embed", by="token", l2=1.0),
    }
    for name, job in jobs.items():
        tracemalloc.start()
        job()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < whole / 3, name


def test_a_probe_is_an_array(model: HookedTransformer, made: Harvest) -> None:
    found = made.probe(LABELS, Z)
    assert found.direction.shape == made[Z].shape[1:]
    assert Steer(Z, found, coefficient=2.0) == Steer(Z, found.direction, coefficient=2.0)
    assert Patch(Z, found) == Patch(Z, found.direction)
    tokens = np.asarray([[3, 1, 4, 1, 5]])
    _, cache = model.run_with_cache(tokens, names_filter=Z)
    with model.intervene(Steer(Z, found)):
        _, steered = model.run_with_cache(tokens, names_filter=Z)
    assert found.scores(cache[Z]).shape == (1, 5)
    moved = found.scores(steered[Z]) - found.scores(cache[Z])
    np.testing.assert_allclose(moved, float((found.direction**2).sum()), rtol=1e-4)
    assert found.predict(cache[Z][0, 0]).shape == ()
    with pytest.raises(InputError, match=r"activations \[\.\.\., 4, 32\], not \[1, 5, 128\]"):
        found.scores(np.zeros((1, 5, 128)))


def test_a_probe_is_shown(made: Harvest) -> None:
    import io

    from rich.console import Console

    found = made.probe(LABELS, LAST)
    shown = io.StringIO()
    Console(file=shown, width=80).print(found)
    assert f"{found.held_out.tokens:,}" in shown.getvalue()
    assert "commoner" in shown.getvalue()
    assert f"{found.accuracy:.3f}" in repr(found)


# Bad input


def every(made: Harvest, *arguments: Any, **options: Any) -> list[str]:
    """What direction and probe say of the same labels."""
    said = []
    for method in (made.direction, made.probe):
        with pytest.raises(InputError) as caught:
            method(*arguments, **options)
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize(
    ("labels", "by", "wanted"),
    [
        (LABELS[:5], "document", "each of the 40 documents, not bool [5]"),
        (LABELS, "token", "tokens, not bool [40]"),
        (np.zeros(COUNT, bool), "document", "the label True"),
        (np.ones(COUNT, bool), "document", "the label False"),
        (np.where(LABELS, 1.0, np.nan), "document", "labels hold NaN"),
        (LABELS.astype(float), "document", "not float64 [40]"),
        (np.arange(COUNT), "document", "labels == kind"),
        (["yes"] * COUNT, "document", "labels == kind"),
        ([None, "yes", *[True] * 38], "document", "the label of document 1 is 'yes'"),
        ({0: True, 40: False}, "document", "the document 40"),
        ({0: True, "1": False}, "document", "the document '1'"),
        ({0: 2}, "document", "is 2: a label is True or False"),
        (lambda record: "yes", "document", "the label of document 0 is 'yes'"),
        (lambda record: [True], "token", "tokens of document 0, not bool [1]"),
        (True, "document", "not bool []"),
        (LABELS, "row", "a 'document' or a 'token'"),
        (LABELS, None, "a 'document' or a 'token'"),
    ],
)
def test_labels_that_are_none(made: Harvest, labels: Any, by: Any, wanted: str) -> None:
    for said in every(made, labels, LAST, by=by):
        assert wanted in said


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"kind": "svm"}, "'logistic', 'ridge', 'mean'"),
        ({"l2": 0.0}, "l2"),
        ({"l2": float("nan")}, "l2"),
        ({"test": 1.0}, "test"),
        ({"seed": -1}, "seed"),
        ({"confidence": 95}, "confidence"),
        ({"groups": [1, 2]}, "each of the 40 documents"),
        ({"groups": np.zeros(COUNT)}, "no token of the held-out part has the label"),
    ],
)
def test_options_that_cannot_be(made: Harvest, options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(InputError) as caught:
        made.probe(LABELS, LAST, **options)
    assert wanted in str(caught.value)


def test_what_cannot_be_probed(model: HookedTransformer, made: Harvest, tmp_path: Path) -> None:
    for said in every(made, LABELS, "blocks.0.hook_resid_pre"):
        assert "was not harvested" in said
    with pytest.raises(InputError, match="was not harvested"):
        made.mean("blocks.0.hook_resid_pre")
    with pytest.raises(InputError, match="1 with True"):  # one document cannot be on both sides
        made.probe({0: True, 1: False, 2: False}, LAST)
    with pytest.raises(InputError, match="nothing to take the mean of"):
        made.mean(LAST, LABELS & False)
    same = harvest(model, [[5, 6], [5, 6]], LAST, tmp_path / "s", verbose=False)
    with pytest.raises(InputError, match="0 has no direction"):
        same.direction([True, False], LAST, unit=True)


def test_activations_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    huge = np.full(model.cfg.d_model, 3e38, np.float32)
    model.set_weights({"blocks.0.mlp.b_out": huge, "blocks.1.mlp.b_out": huge})
    name = "blocks.1.hook_resid_post"
    found = harvest(model, [[1, 2], [3, 4], [5]], name, tmp_path / "h", verbose=False)
    with pytest.raises(InputError, match="token 2 is NaN or infinite"):
        found.direction({1: True, 2: False}, name)
    with pytest.raises(InputError, match="token 0 is NaN or infinite"):
        found.mean(name)
    more = harvest(model, np.arange(1, 13).reshape(6, 2), name, tmp_path / "m", verbose=False)
    with pytest.raises(InputError, match="is NaN or infinite"):
        more.probe([True, False] * 3, name)
