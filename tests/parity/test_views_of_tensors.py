"""The views of the torch face's tensors are those of the arrays."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
import transformer_lens

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


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
def test_a_cache_of_transformer_lens_is_shown_too() -> None:
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=4, n_heads=3, d_vocab=50, act_fn="gelu", d_mlp=32
    )
    _, cache = transformer_lens.HookedTransformer(config).run_with_cache(torch.tensor([[1, 2, 3, 4]]))
    view = views.attention(cache, [1, 2, 3, 4])
    assert view.data["tokens"] == ["1", "2", "3", "4"]
    packed = view.data["patterns"]
    assert isinstance(packed, dict)
    found = np.frombuffer(base64.b64decode(str(packed["b"])), "<f4")
    rows, columns = np.tril_indices(4)
    wanted = np.stack([cache["pattern", layer][0].numpy() for layer in range(2)])[:, :, rows, columns]
    np.testing.assert_array_equal(found, wanted.ravel())
