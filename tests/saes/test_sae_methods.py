"""The methods that put SAEs into a model and take them away: who sees which SAE when, and what is refused."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, HookedTransformer, InputError, Sae, Scale, UnknownHookPoint, metrics
from graphlens.analysis.sites import Site
from graphlens.edits.spliced_sae import SplicedSae
from tests.saes.odd_model import TOKENS, model
from tests.saes.sae_cases import D_MODEL, MLP_OUT, NORMED, RESID, VOCABULARY, Z, made

FIRST = "blocks.0.hook_resid_post"
POST = f"{RESID}.hook_sae_acts_post"


@pytest.fixture
def odd() -> Iterator[HookedTransformer]:
    opened = model()
    yield opened
    opened.reset_saes()


def test_added_until_reset(odd: HookedTransformer) -> None:
    one, two, plain = made(1, hook=RESID), made(2, hook=FIRST), odd(TOKENS)
    odd.add_sae(one)
    odd.add_sae(two, use_error_term=True)
    assert odd.acts_to_saes == {RESID: one, FIRST: two}
    assert odd.hook_points()[POST] == (f"[batch, pos, {one.cfg.d_sae}]", "float32")
    with_both = odd(TOKENS)
    odd.reset_saes(FIRST)
    assert odd.acts_to_saes == {RESID: one}
    assert np.abs(odd(TOKENS) - with_both).max() <= 1e-4 * np.abs(with_both).max()  # it had its error term
    odd.add_sae(made(3, hook=RESID))  # in the place of the first
    assert np.abs(odd(TOKENS) - with_both).max() > 1e-2
    odd.reset_saes()
    assert np.array_equal(odd(TOKENS), plain)
    with pytest.warns(UserWarning, match="nothing to reset"):
        odd.reset_saes(RESID)
    with pytest.raises(UnknownHookPoint, match="only while an SAE stands there"):
        odd.run_with_cache(TOKENS, names_filter=POST)


def test_blocks_put_back_what_was_there(odd: HookedTransformer) -> None:
    one, two = made(1, hook=RESID), made(2, hook=RESID)
    odd.add_sae(one)
    with_one = odd(TOKENS)
    with odd.saes([two, made(3, hook=FIRST)]) as same:
        assert same is odd
        assert odd.acts_to_saes[RESID] is two
        assert len(odd.acts_to_saes) == 2
        with odd.saes(one):
            assert odd.acts_to_saes[RESID] is one
    assert odd.acts_to_saes == {RESID: one}
    assert np.array_equal(odd(TOKENS), with_one)
    odd.run_with_saes(TOKENS, saes=two, reset_saes_end=False)
    assert odd.acts_to_saes == {RESID: two}
    with pytest.raises(ZeroDivisionError), odd.saes(one):
        raise ZeroDivisionError
    assert odd.acts_to_saes == {RESID: two}
    with odd.saes(one):
        odd.reset_saes()
        assert odd.acts_to_saes == {}
    assert odd.acts_to_saes == {}


def test_a_block_is_its_threads_own(odd: HookedTransformer) -> None:
    plain, seen = odd(TOKENS), []
    with odd.saes(made(1, hook=RESID)):
        thread = threading.Thread(target=lambda: seen.append(odd(TOKENS)))
        thread.start()
        thread.join()
        assert np.abs(odd(TOKENS) - plain).max() > 1e-2
    assert np.array_equal(seen[0], plain)


def test_runs_with_saes(odd: HookedTransformer) -> None:
    sae = made(1, hook=RESID)
    with odd.saes(sae):
        logits, loss = odd(TOKENS), odd(TOKENS, return_type="loss")
    assert np.array_equal(odd.run_with_saes(TOKENS, saes=[sae]), logits)
    assert odd.run_with_saes(TOKENS, return_type="loss", saes=sae) == loss
    found, cache = odd.run_with_cache_with_saes(TOKENS, saes=sae, names_filter=[POST], remove_batch_dim=False)
    assert list(cache) == [POST]
    assert np.array_equal(found, logits)
    seen: list[Any] = []
    hooked = odd.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=[(POST, lambda x, hook: seen.append(x.shape))])
    assert np.array_equal(hooked, logits)
    assert seen == [(2, 6, sae.cfg.d_sae)]
    assert odd.acts_to_saes == {}


def test_the_torch_face_gives_the_same(odd: HookedTransformer) -> None:
    import torch

    from graphlens.torch import HookedTransformer as TorchModel

    sae, tensors = made(1, hook=RESID, architecture="topk", k=5), TorchModel(odd.runner.engine)
    logits, cache = tensors.run_with_cache_with_saes(torch.from_numpy(TOKENS), saes=sae, use_error_term=True)
    expected, arrays = odd.run_with_cache_with_saes(TOKENS, saes=sae, use_error_term=True)
    assert np.array_equal(logits.numpy(), expected)
    assert np.array_equal(cache[POST].numpy(), arrays[POST])
    # A backward hook at a feature sees what model.gradients gives.
    seen: dict[str, Any] = {}
    with (
        tensors.saes(sae, use_error_term=True),
        tensors.hooks(bwd_hooks=[(POST, lambda g, hook: seen.update({POST: g}))]),
    ):
        last = tensors(torch.from_numpy(TOKENS))[:, -1]
        (last[:, 3] - last[:, 7]).mean().backward()
    with odd.saes(sae, use_error_term=True):
        found = odd.gradients(TOKENS, metrics.LogitDiff([3, 3], [7, 7]), names=[POST])[POST]
    assert np.abs(seen[POST].numpy() - found).max() <= 1e-5 * np.abs(found).max()


def test_copies_and_pickles_have_the_saes(odd: HookedTransformer) -> None:
    odd.add_sae(made(1, hook=RESID, architecture="gated"), exclude_special_tokens=[int(TOKENS[0, 0])])
    logits = odd(TOKENS)
    assert np.array_equal(copy.deepcopy(odd)(TOKENS), logits)
    assert np.array_equal(pickle.loads(pickle.dumps(odd))(TOKENS), logits)


def test_weights_that_were_set_and_saes(odd: HookedTransformer) -> None:
    sae, name = made(1, hook=RESID), "blocks.2.mlp.b_out"
    with odd.saes(sae):
        before = odd(TOKENS)
        odd.set_weights({name: odd.runner.weights[name] + np.arange(D_MODEL)})
        after = odd(TOKENS)
    other = model()
    other.set_weights({name: other.runner.weights[name] + np.arange(D_MODEL)})
    assert np.array_equal(other.run_with_saes(TOKENS, saes=sae), after)
    assert np.abs(after - before).max() > 1e-3


def test_a_model_that_runs_block_by_block(odd: HookedTransformer) -> None:
    sae = made(1, hook=RESID, architecture="jumprelu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        streamed = HookedTransformer.from_onnx(odd.runner.engine.path, max_memory=200_000)
    feature = Scale(POST, 3.0, dims=[4])
    with odd.saes(sae, use_error_term=True), odd.intervene(feature):
        expected = odd(TOKENS)
    with streamed.saes(sae, use_error_term=True), streamed.intervene(feature):
        found, cache = streamed.run_with_cache(TOKENS)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert cache[POST].shape[-1] == sae.cfg.d_sae


def test_sweeps_over_features_are_loops(odd: HookedTransformer) -> None:
    """Each feature zeroed at each position in turn, and the same one after the other."""
    sae = made(1, hook=RESID)
    sites = [Site(POST, position=position, dims=dim) for position in (1, 4) for dim in range(0, 50, 9)]
    metric = metrics.LogitDiff([3, 4], [7, 8])
    with odd.saes(sae, use_error_term=True):
        found = graphlens.sweep(odd, TOKENS, sites, "zero", metric, verbose=False)
        assert "general_path" not in found.metadata
        for site, value in zip(sites, np.ravel(found.values), strict=True):
            with odd.intervene(Ablate(POST, positions=site.position, dims=[site.dims])):
                assert abs(metric(odd(TOKENS)) - value) <= 1e-5
        whole = graphlens.sweep(odd, TOKENS, sites, "zero", metric, verbose=False, recompute=False)
    assert np.abs(whole.values - found.values).max() <= 1e-5


def test_paths_and_edges_are_of_the_plain_model(odd: HookedTransformer) -> None:
    clean = odd.run_with_cache(np.roll(TOKENS, 1))[1]
    with odd.saes(made(1, hook=RESID)), pytest.raises(InputError, match="plain model"):
        graphlens.attribution.edge_attribution(odd, TOKENS, clean, metrics.LogitDiff([3, 4], [7, 8]))


# What is refused


@pytest.mark.parametrize(
    ("sae", "error", "said"),
    [
        (made(1, width=16, hook=RESID), InputError, "d_in 16.*width of 35"),
        (made(1, hook="blocks.7.hook_resid_post"), UnknownHookPoint, "3 layers"),
        (made(1, hook="blocks.1.hook_resid_pots"), UnknownHookPoint, "Nearest"),
        (made(1, hook="blocks.1.attn.hook_pattern"), InputError, "cannot stand"),
        (made(1, hook=RESID, reshape_activations="hook_z"), InputError, "head, d_head"),
        (made(1, hook=MLP_OUT, hook_out=NORMED, architecture="transcoder"), InputError, "comes after"),
        (made(1, width_out=9, hook=NORMED, hook_out=MLP_OUT, architecture="transcoder"), InputError, "d_out 9"),
        (made(1, hook=f"{RESID}.hook_sae_output"), UnknownHookPoint, "only while an SAE stands there"),
    ],
)
def test_saes_that_do_not_fit(odd: HookedTransformer, sae: Sae, error: type[Exception], said: str) -> None:
    plain = odd(TOKENS)
    with pytest.raises(error, match=said):
        odd.add_sae(sae)
    with pytest.raises(error, match=said):
        odd.saes([made(2, hook=FIRST), sae])
    assert odd.acts_to_saes == {}
    assert np.array_equal(odd(TOKENS), plain)


def test_what_is_no_sae(odd: HookedTransformer) -> None:
    for what in ({"W_enc": 1}, "folder", None, np.zeros((3, 4))):
        with pytest.raises((TypeError, InputError)):
            odd.add_sae(what)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="error_term"):
        odd.add_sae(made(1, hook=RESID), use_error_term="yes")  # type: ignore[arg-type]
    assert odd.acts_to_saes == {}


def test_two_at_one_place(odd: HookedTransformer) -> None:
    odd.add_sae(made(1, hook=MLP_OUT))
    with pytest.raises(InputError, match="two SAEs would stand for"):
        odd.add_sae(made(2, hook=NORMED, hook_out=MLP_OUT, architecture="transcoder"))
    graph = graphlens.surgery.with_sae(graphlens.surgery.load(odd.runner.engine.path), made(1, hook=MLP_OUT))
    with pytest.raises(InputError, match="already"):
        graphlens.surgery.with_sae(graph, made(2, hook=MLP_OUT))


def test_a_place_behind_which_nothing_goes_on(odd: HookedTransformer) -> None:
    with pytest.raises(InputError, match="the model's result"):
        odd.add_sae(made(1, width=VOCABULARY, hook="unembed.hook_out"))


def test_a_graph_with_gradients(odd: HookedTransformer) -> None:
    """Its gradients would be those without the SAE."""
    graph = graphlens.surgery.differentiate(graphlens.surgery.load(odd.runner.engine.path), [RESID])
    with pytest.raises(InputError, match="Put the SAE in first"):
        graphlens.surgery.with_sae(graph, made(1, hook=RESID))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"features": 3}, "a list of the features"),
        ({"exclude_special_tokens": [2**70]}, "a token to leave out"),
        ({"exclude_special_tokens": [-1]}, "a token to leave out"),
    ],
)
def test_settings_that_cannot_be(odd: HookedTransformer, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        odd.add_sae(made(1, hook=RESID), **settings)
    assert odd.acts_to_saes == {}


def test_two_of_one_call_that_read_one_hook_point(odd: HookedTransformer) -> None:
    """Neither is dropped in silence."""
    both = [made(1, hook=NORMED), made(2, hook=NORMED, hook_out=MLP_OUT, architecture="transcoder")]
    with pytest.raises(InputError, match="two SAEs of one call read"):
        odd.run_with_saes(TOKENS, saes=both)
    assert odd.acts_to_saes == {}


def test_a_folder_that_another_sae_is_saved_to(odd: HookedTransformer, tmp_path: Path) -> None:
    """Each SAE runs with the weights that it was opened with."""
    first, second = (made(seed, hook=RESID, d_sae=300) for seed in (1, 2))
    first.save(tmp_path / "sae")
    opened = Sae.from_folder(tmp_path / "sae")
    shutil.rmtree(tmp_path / "sae")
    second.save(tmp_path / "sae")
    for sae, its in ((opened, first), (Sae.from_folder(tmp_path / "sae"), second)):
        assert np.array_equal(odd.run_with_saes(TOKENS, saes=sae), model().run_with_saes(TOKENS, saes=its))


def test_an_sae_of_another_model_warns(odd: HookedTransformer) -> None:
    with pytest.warns(UserWarning, match="trained on gemma-2-2b"):
        odd.add_sae(made(1, hook=RESID, model_name="gemma-2-2b"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd.add_sae(made(1, hook=RESID, model_name=f"someone/{odd.cfg.model_name}"))


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("blocks.1.hook_resid_post", "center_writing_weights"),
        ("blocks.1.attn.hook_z", "fold_value_biases"),
        ("blocks.1.ln2.hook_normalized", None),
        ("blocks.1.hook_mlp_out", "center_writing_weights"),
    ],
)
def test_an_sae_of_weights_that_were_not_processed_warns(tiny: HookedTransformer, hook: str, step: str | None) -> None:
    """Where the activations that it reads are others by that, and where it says so."""
    processed, tokens = HookedTransformer.from_pretrained("tiny-gpt2"), tiny.to_tokens("When John and Mary")
    found, expected = (opened.run_with_cache(tokens)[1][hook] for opened in (processed, tiny))
    assert (np.abs(found - expected).max() > 1e-3) == (step is not None)
    heads = {"reshape_activations": "hook_z"} if hook.endswith("hook_z") else {}
    opened = dict.fromkeys(("fold_ln", "center_writing_weights", "fold_value_biases"), False)
    sae = made(1, width=tiny.cfg.d_model, hook=hook, metadata={"model_from_pretrained_kwargs": opened}, **heads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tiny.saes(sae), processed.saes(made(1, width=tiny.cfg.d_model, hook=hook, **heads)):
            pass
        if step is None:
            processed.add_sae(sae)
    if step is not None:
        with pytest.warns(UserWarning, match=f"trained on weights without {step}, .*pass {step}=False"):
            processed.add_sae(sae)


def test_tokens_to_leave_out(odd: HookedTransformer, tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        odd.add_sae(made(1, hook=RESID), exclude_special_tokens=True)
    odd.add_sae(made(1, hook=RESID), exclude_special_tokens=[5])
    with pytest.raises(InputError, match="left out at some tokens"):
        odd(odd.run_with_cache(TOKENS)[1]["blocks.1.hook_resid_pre"], start_at_layer=1)
    assert tiny.tokenizer is not None
    sae = made(1, width=tiny.cfg.d_model, hook=RESID)
    tokens = tiny.to_tokens("When John and Mary")
    _, cache = tiny.run_with_cache_with_saes(tokens, saes=sae, exclude_special_tokens=True)
    same = (cache[f"{RESID}.hook_sae_output"] == cache[RESID]).all(-1)
    assert np.array_equal(same, tokens == tiny.tokenizer.bos_token_id)
    assert same.sum() == 1


def test_features_that_are_not_there(odd: HookedTransformer) -> None:
    sae = made(1, hook=RESID)
    with pytest.raises(InputError, match="feature"):
        odd.add_sae(sae, features=[3, 53])
    odd.add_sae(sae, features=[3, 52])
    for dims in ([2], [-3]):
        with pytest.raises(InputError, match="dims"), odd.intervene(Ablate(POST, dims=dims)):
            pass
    odd.add_sae(sae)
    with pytest.raises(InputError, match="dims"), odd.intervene(Ablate(POST, dims=[53])):
        pass


def test_records_compare_by_what_they_hold() -> None:
    one, two = made(1, hook=RESID), made(1, hook=RESID)
    assert SplicedSae.of(one) == SplicedSae.of(two)
    assert SplicedSae.of(one) != SplicedSae.of(one, error_term=True)
    assert SplicedSae.of(one) != SplicedSae.of(made(2, hook=RESID))
    assert SplicedSae.of(one, excluded=[3, 1]) == SplicedSae.of(one, excluded=(1, 3, 3))
    assert one.cfg.d_in == D_MODEL
    assert Z.endswith("hook_z")
