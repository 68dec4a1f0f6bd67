"""Models from unusual configs beside TransformerLens 3.9's: windows of one token, fewer outputs than tokens, late positions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens
from transformer_lens import utilities as lens_utils
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig as LensConfig

import graphlens
from graphlens import InputError
from graphlens.model.initial import initial_weights
from graphlens.model.sampling import sample_logits
from graphlens.torch import HookedTransformer, HookedTransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
BASE: dict[str, Any] = {
    "n_layers": 2, "d_model": 9, "d_head": 4, "n_heads": 3, "n_ctx": 8, "d_vocab": 11, "act_fn": "gelu", "seed": 1,
}  # fmt: skip
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
Pair = tuple[HookedTransformer, transformer_lens.HookedTransformer]


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHLENS_CACHE", str(tmp_path_factory.getbasetemp() / "configs-cache"))
        yield


def pair_of(**other: Any) -> Pair:
    """The same model in both libraries, with nothing at its beginning."""
    lens = transformer_lens.HookedTransformer(LensConfig(**BASE, **other)).eval()
    model = HookedTransformer(HookedTransformerConfig(**BASE, **other))
    torch.manual_seed(17)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    model.load_state_dict(lens.state_dict())
    return model, lens


def close(found: Any, expected: torch.Tensor) -> None:
    found, expected = torch.as_tensor(found).detach(), expected.detach()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 5e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("types", [["local", "local"], ["global", "local"]], ids=str)
def test_a_token_may_see_itself_alone(types: list[str]) -> None:
    model, lens = pair_of(use_local_attn=True, window_size=1, attn_types=types)
    expected, theirs = lens.run_with_cache(TOKENS)
    found, ours = model.run_with_cache(TOKENS)
    close(found, expected)
    for layer in range(2):
        close(ours["pattern", layer], theirs["pattern", layer])
        if types[layer] == "local":
            assert torch.equal(ours["pattern", layer], torch.eye(5).expand(2, 3, 5, 5))


@pytest.mark.parametrize("penalty", [{"freq_penalty": 1.5}, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.4}])
def test_a_penalty_passes_over_tokens_that_are_never_drawn(penalty: dict[str, float]) -> None:
    # The same as in a model that has an output for every token, most of them never likely.
    (few, _), (more, _) = pair_of(d_vocab_out=4), pair_of()
    weights = few.state_dict()
    matrix, bias = torch.zeros(9, 11), torch.full((11,), -1e6)
    matrix[:, :4], bias[:4] = weights["unembed.W_U"], weights["unembed.b_U"]
    more.load_state_dict({**weights, "unembed.W_U": matrix, "unembed.b_U": bias})
    how: dict[str, Any] = {"max_new_tokens": 3, "stop_at_eos": False, "verbose": False, "top_k": 1, **penalty}
    expected = more.generate(TOKENS, **how)
    assert torch.equal(few.generate(TOKENS, **how), expected)
    face = graphlens.HookedTransformer(graphlens.HookedTransformerConfig(**BASE, d_vocab_out=4))
    face.load_state_dict({name: value.numpy() for name, value in weights.items()})
    assert np.array_equal(face.generate(TOKENS.numpy(), **how), expected.numpy())


def test_penalties_are_the_same_on_both_faces() -> None:
    rng = np.random.default_rng(2)
    logits, tokens = rng.standard_normal((3, 11)).astype(np.float32) * 3, rng.integers(0, 11, (3, 20))
    for how in ({"repetition_penalty": 1.8}, {"freq_penalty": 0.7}, {"repetition_penalty": 0.6, "freq_penalty": -0.3}):
        ours = sample_logits(logits, top_k=1, tokens=tokens, **how)
        assert np.array_equal(
            ours, sample_logits(torch.from_numpy(logits), top_k=1, tokens=torch.from_numpy(tokens), **how)
        )
        expected = lens_utils.sample_logits(torch.from_numpy(logits), top_k=1, tokens=torch.from_numpy(tokens), **how)
        assert np.array_equal(ours, expected.numpy())


def test_a_run_that_starts_late_has_late_positions() -> None:
    model, lens = pair_of(positional_embedding_type="shortformer")
    expected, theirs = lens.run_with_cache(TOKENS)
    own = model.pos_embed(TOKENS)
    close(own, lens.pos_embed(TOKENS))
    start = theirs["resid_pre", 1].detach()
    close(lens(start, start_at_layer=1, shortformer_pos_embed=own), expected)
    for given in (None, own, own[0]):
        close(model(start, start_at_layer=1, shortformer_pos_embed=given), expected)
    for other in (own * 2, own[:, :3], own[..., :4]):
        with pytest.raises(InputError, match="adds its own position embeddings"):
            model(start, start_at_layer=1, shortformer_pos_embed=other)
    with pytest.raises(InputError, match="is not called by itself"):
        model.blocks[1](start, shortformer_pos_embed=own)


def test_threads_may_build_the_same_model_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path))
    calls = [{**BASE, "seed": seed, "d_mlp": 12 + seed} for seed in (0, 1, 0, 1)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: HookedTransformer(HookedTransformerConfig(**call))(TOKENS), calls))
    for call, logits in zip(calls, found, strict=True):
        close(logits, transformer_lens.HookedTransformer(LensConfig(**call))(TOKENS))


def test_what_other_threads_draw_does_not_change_a_seeds_weights() -> None:
    config = HookedTransformerConfig(**{**BASE, "d_model": 64, "d_vocab": 500})
    expected = initial_weights(config)
    following = torch.rand(3)
    transformer_lens.HookedTransformer(LensConfig(**{**BASE, "d_model": 64, "d_vocab": 500}))
    assert torch.equal(torch.rand(3), following)
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            torch.rand(100)

    other = threading.Thread(target=draw)
    other.start()
    try:
        for _ in range(20):
            for name, value in initial_weights(config).items():
                assert np.array_equal(value, expected[name]), name
    finally:
        done.set()
        other.join()


def test_a_cached_model_that_lost_its_graph_is_made_again() -> None:
    model, lens = pair_of()
    model.runner.engine.path.unlink()
    again = HookedTransformer(HookedTransformerConfig(**BASE))
    again.load_state_dict(lens.state_dict())
    close(again(TOKENS), lens(TOKENS))


def test_the_config_of_a_file_says_less_than_its_graph() -> None:
    config = graphlens.HookedTransformer.from_onnx(graphlens.embedded_model("tiny-llama"), "cpu").cfg
    with pytest.warns(UserWarning, match="does not say whether its rotary frequencies are scaled"):
        HookedTransformer(config)
    other = HookedTransformerConfig(**BASE)
    other.residual_norms = True  # as OPT-350m's
    with pytest.raises(InputError, match="residual_norms=True: no model is built from the config of a file"):
        HookedTransformer(other)
