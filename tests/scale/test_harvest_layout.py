"""How documents become rows, batches and shards: nothing lost, nothing twice, all within its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphlens.file.harvest_layout import STEP, Laid, Layout

LAYOUTS = st.builds(
    Layout,
    context=st.integers(2, 40),
    bos=st.sampled_from([None, 0]),
    own_bos=st.sampled_from([None, 0]),
    pad=st.just(99),
    pack=st.booleans(),
    too_long=st.sampled_from(["split", "cut"]),
    keep_bos=st.booleans(),
    keep_pad=st.booleans(),
    last_only=st.booleans(),
    batch_tokens=st.integers(1, 200),
    shard_tokens=st.integers(1, 300),
).filter(lambda layout: not (layout.keep_pad and layout.last_only))


@settings(max_examples=300, deadline=None)
@given(layout=LAYOUTS, lengths=st.lists(st.integers(0, 90), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_each_token_has_its_place(layout: Layout, lengths: list[int], seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 7, sum(lengths)).astype(np.int32)
    laid = Laid(layout, ids, *layout.rows(np.asarray(lengths, np.int64)))
    shards = laid.shards()
    assert shards[:, 3].sum() == laid.kept.sum()
    assert [int(row) for shard in shards for row in range(shard[0], shard[1])] == list(range(len(laid)))
    real: list[tuple[int, int]] = []
    for first, last, start, count in shards.tolist():
        shard = laid.shard(first, last)
        assert len(shard.tokens) == len(shard.documents) == len(shard.positions) == count
        assert start == sum(shards[shards[:, 0] < first, 3])
        assert last - first == 1 or laid.lengths[first:last].sum() <= layout.shard_tokens
        targets = np.concatenate([batch.target for batch in shard.batches])
        assert np.array_equal(np.sort(targets), np.arange(count))
        for batch in shard.batches:
            rows, width = batch.tokens.shape
            assert width <= layout.context
            assert width % STEP == 0 or width == layout.context
            assert rows == 1 or batch.tokens.size <= layout.batch_tokens
            assert np.array_equal(batch.tokens.ravel()[batch.source], shard.tokens[batch.target])
            assert np.array_equal(batch.source % width, shard.positions[batch.target])
        real += zip(shard.documents.tolist(), shard.tokens.tolist(), strict=True)
    if layout.keep_pad:
        assert not layout.keep_bos or len(real) == len(laid) * layout.context
        return
    starts = np.cumsum([0, *lengths])
    for document, length in enumerate(lengths):
        whole = ids[starts[document] : starts[document] + length].tolist()
        if layout.too_long == "cut":
            whole = whole[: layout.room]
        mine = [token for owner, token in real if owner == document]
        if layout.last_only:
            assert mine == whole[-1:]
        elif layout.bos is None:
            dropped = not layout.keep_bos and layout.own_bos is not None and whole[:1] == [layout.own_bos]
            assert mine == whole[int(dropped) :]
        elif not layout.keep_bos and layout.own_bos is None:
            assert mine == whole
        else:
            assert [token for token in mine if token] == [token for token in whole if token]


@pytest.mark.parametrize("bos", [None, 0])
def test_rows_of_their_own_are_rows_that_are_never_shared(bos: int | None) -> None:
    lengths = np.asarray([5, 0, 19, 7, 40, 1])
    alone = Layout(context=8, bos=bos)
    segments, rows = alone.rows(lengths)
    assert np.array_equal(rows, np.arange(len(segments) + 1))
    each = [Layout(context=8, bos=bos, pack=True).rows(lengths[at : at + 1])[0] for at in range(len(lengths))]
    starts = np.cumsum([0, *lengths])
    shifted = [part + np.asarray([at, starts[at], 0, 0, 0]) for at, part in enumerate(each) if len(part)]
    assert np.array_equal(segments, np.concatenate(shifted))
