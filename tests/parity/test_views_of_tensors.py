"""The views of the torch face's tensors are those of the arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import graphlens.torch
from graphlens import HookedTransformer, views
from graphlens.views.encoded import floats

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_taken_in_every_precision(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.5, -2.0, float("nan")], dtype=dtype, requires_grad=True)
    found = floats(tensor, "x")
    assert found.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    np.testing.assert_array_equal(found, [1.5, -2.0, np.nan])


def test_the_views_of_tensors_are_those_of_arrays() -> None:
    made = []
    for face in (HookedTransformer, graphlens.torch.HookedTransformer):
        model = face.from_pretrained_no_processing("tiny-gpt2")
        _, cache = model.run_with_cache(PROMPT)
        loss = model(PROMPT, return_type="loss", loss_per_token=True)
        parts = [
            *(
                views.attention(cache, tokens)
                for tokens in (PROMPT, model.to_tokens(PROMPT), model.to_str_tokens(PROMPT))
            ),
            views.lens(cache, model.to_tokens(PROMPT), answer=" Mary"),
            views.text(PROMPT, loss, model=model),
            cache,
            model.cfg,
        ]
        made.append(views.report(parts).views)
    for arrays, tensors in zip(*made, strict=True):
        if arrays.kind == "table":
            continue  # names of classes and devices differ
        assert arrays.data == tensors.data, arrays.kind
    assert made[0][0].data == made[0][1].data == made[0][2].data
