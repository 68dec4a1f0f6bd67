"""SAEs in graphs against torch: values of every hook point, logits, edits and gradients, for every architecture and place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sae_reference import Passed, passed

from graphlens import Ablate, HookedTransformer, KeyValueCache, Patch, Sae, Scale, Steer, metrics
from graphlens.edits.kinds import Intervention
from tests.saes.odd_model import TOKENS, model
from tests.saes.sae_cases import D_SAE, MLP_OUT, NORMED, RESID, Case, cases, made

CASES = cases()
each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
LOGIT = metrics.LogitDiff([3, 4], [7, 8])


@pytest.fixture(scope="module")
def odd() -> HookedTransformer:
    return model()


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max()))


def reference(
    odd: HookedTransformer,
    sae: Sae,
    error_term: bool = False,
    edits: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    left_out: Any = None,
) -> tuple[Any, Passed]:
    """(logits, the SAE's values) of a plain model with a Python hook that calls the SAE in torch."""
    cfg, kept = sae.cfg, {}

    def keep(value: Any, hook: Any) -> None:
        kept["x"] = torch.from_numpy(value.copy())

    def stand_in(value: Any, hook: Any) -> Any:
        original = torch.from_numpy(value.copy())
        mask = None if left_out is None else torch.from_numpy(left_out)
        kept["passed"] = passed(sae, kept["x"], error_term, edits, original, mask)
        return kept["passed"].output.numpy()

    logits = odd.run_with_hooks(TOKENS, fwd_hooks=[(cfg.hook, keep), (cfg.writes, stand_in)])
    return logits, kept["passed"]


@each_case
def test_values_and_logits(odd: HookedTransformer, case: Case) -> None:
    sae = case.sae
    expected, torchs = reference(odd, sae, case.error_term)
    logits, cache = odd.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=case.error_term)
    close(logits, expected)
    values = torchs.arrays()
    names = [f"{sae.cfg.writes}.{name}" for name in values]
    assert [name for name in cache if "hook_sae" in name] == names
    for name, value in zip(names, values.values(), strict=True):
        close(cache[name], value)
    if case.error_term:
        close(logits, odd(TOKENS))
    else:
        assert np.abs(logits - odd(TOKENS)).max() > 1e-2


@each_case
def test_edits_at_every_hook_point(odd: HookedTransformer, case: Case) -> None:
    """Several edits at once: as data, as Python hooks, and in torch. The error is what it was without them."""
    sae, at = case.sae, case.sae.cfg.writes
    plain = reference(odd, sae, case.error_term)[1].arrays()
    wide = np.linspace(-1, 1, plain["hook_sae_output"].shape[-1]).astype(np.float32)
    edits: dict[str, tuple[Intervention, Callable[[Any], Any]]] = {
        "hook_sae_input": (Scale(f"{at}.hook_sae_input", 1.1), lambda x: x * 1.1),
        "hook_sae_acts_pre": (Steer(f"{at}.hook_sae_acts_pre", 0.7, dims=[5]), lambda x: _added(x, 5, 0.7)),
        "hook_sae_acts_post": (Ablate(f"{at}.hook_sae_acts_post", dims=[7, 11]), lambda x: _without(x, [7, 11])),
        "hook_sae_recons": (Scale(f"{at}.hook_sae_recons", 0.9), lambda x: x * 0.9),
        "hook_sae_output": (Steer(f"{at}.hook_sae_output", wide), lambda x: x + _like(wide, x)),
    }
    for names in (["hook_sae_acts_post"], ["hook_sae_acts_pre", "hook_sae_recons"], list(edits)):
        expected, torchs = reference(odd, sae, case.error_term, {name: edits[name][1] for name in names})
        with odd.saes([sae], use_error_term=case.error_term):
            with odd.intervene([edits[name][0] for name in names]):
                logits, cache = odd.run_with_cache(TOKENS)
            hooked = odd.run_with_hooks(TOKENS, fwd_hooks=[(f"{at}.{name}", _hook(edits[name][1])) for name in names])
        close(logits, expected)
        close(hooked, expected)
        for name, value in torchs.arrays().items():
            close(cache[f"{at}.{name}"], value)
        if case.error_term:
            close(cache[f"{at}.hook_sae_error"], plain["hook_sae_error"])


def _added(x: Any, place: int, number: float) -> Any:
    x = x * 1
    x[..., place] += number
    return x


def _without(x: Any, places: list[int]) -> Any:
    x = x * 1
    x[..., places] = 0
    return x


def _like(array: Any, x: Any) -> Any:
    return torch.from_numpy(array) if isinstance(x, torch.Tensor) else array


def _hook(edit: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda value, hook: edit(value)


@each_case
def test_gradients(odd: HookedTransformer, case: Case) -> None:
    """From the gradient of what goes on, torch's autograd gives those of everything before; the error is a constant."""
    sae, at = case.sae, case.sae.cfg.writes
    names = [
        f"{at}.{name}" for name in ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")
    ]
    out, reads = f"{at}.hook_sae_output", sae.cfg.hook
    error = [f"{at}.hook_sae_error"] * case.error_term
    same = [at] * (reads == at)
    with odd.saes([sae], use_error_term=case.error_term):
        found = odd.gradients(TOKENS, LOGIT, names=[*names, out, *same, *error])
        _, cache = odd.run_with_cache(TOKENS)
    x = torch.from_numpy(cache[reads].copy()).requires_grad_()
    torchs = passed(sae, x, case.error_term, original=torch.from_numpy(cache[at].copy()))
    torchs.output.backward(torch.from_numpy(found[out].copy()))
    for name in names:
        close_gradient(found[name], torchs.values[name.rpartition(".")[2]].grad)
    for name in same:
        close_gradient(found[name], x.grad)
    for name in error:
        close_gradient(found[name], found[out])


def test_no_gradient_reaches_what_a_transcoder_stands_for(odd: HookedTransformer) -> None:
    sae = made(hook=NORMED, hook_out=MLP_OUT, architecture="transcoder")
    for error_term in (False, True):
        with odd.saes(sae, use_error_term=error_term), pytest.warns(UserWarning, match="does not depend"):
            found = odd.gradients(TOKENS, LOGIT, names=[MLP_OUT])
        assert not np.any(found[MLP_OUT])


def close_gradient(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 0
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("place", ["resid", "hook_z", "transcoder"])
def test_tokens_that_are_left_out(odd: HookedTransformer, place: str, error_term: bool) -> None:
    sae = next(case.sae for case in CASES if case.name in (f"topk-{place}", f"skip_{place}-normed"))
    special = [int(TOKENS[0, 0]), int(TOKENS[1, 3])]
    mask = np.isin(TOKENS, special)
    expected, torchs = reference(odd, sae, error_term, left_out=mask)
    logits, cache = odd.run_with_cache_with_saes(
        TOKENS, saes=sae, use_error_term=error_term, exclude_special_tokens=special
    )
    close(logits, expected)
    for name, value in torchs.arrays().items():
        close(cache[f"{sae.cfg.writes}.{name}"], value)
    output, original = cache[f"{sae.cfg.writes}.hook_sae_output"], cache[sae.cfg.writes]
    assert np.array_equal(output[mask], original[mask])


def test_several_at_once_whatever_their_order(odd: HookedTransformer) -> None:
    """A residual before, a transcoder that reads what goes on from there, its block's residual, and one of a later block."""
    mid = "blocks.1.hook_resid_mid"
    saes = [
        made(1, hook=mid),
        made(2, hook=mid, hook_out=MLP_OUT, architecture="skip_transcoder"),
        made(3, hook=RESID, architecture="topk", k=9),
        made(4, hook="blocks.2.hook_resid_post", architecture="gated"),
    ]
    # The first reads the same hook point as the second: by SAELens's rule one would take the other's place.
    saes[1] = made(2, hook=NORMED, hook_out=MLP_OUT, architecture="skip_transcoder")
    with odd.saes(saes):
        logits, cache = odd.run_with_cache(TOKENS)
    with odd.saes(saes[::-1]):
        assert np.array_equal(odd(TOKENS), logits)
    for sae in saes:
        expected = passed(sae, torch.from_numpy(cache[sae.cfg.hook].copy())).arrays()
        for name, value in expected.items():
            close(cache[f"{sae.cfg.writes}.{name}"], value)
    close(cache["blocks.2.hook_resid_pre"], cache[f"{RESID}.hook_sae_output"])
    close(cache[RESID], cache[f"{mid}.hook_sae_output"] + cache[f"{MLP_OUT}.hook_sae_output"])


def test_a_transcoder_reads_what_another_sae_makes(odd: HookedTransformer) -> None:
    from graphlens import surgery

    mid = "blocks.1.hook_resid_mid"
    first, second = made(1, hook=mid), made(2, hook=mid, hook_out=MLP_OUT, architecture="transcoder")
    graph = surgery.with_sae(surgery.load(odd.runner.engine.path), first)
    both = surgery.read_manifest(surgery.with_sae(graph, second)).hooks
    assert both[f"{MLP_OUT}.hook_sae_input"].width is None
    from graphlens.edits.spliced_sae import SplicedSae
    from graphlens.engine.plan import Plan

    plan = Plan(saes=(SplicedSae.of(second), SplicedSae.of(first)))
    ran = odd.runner.engine.run(
        {"input_ids": TOKENS}, [f"{mid}.hook_sae_output", f"{MLP_OUT}.hook_sae_input"], plan=plan
    )
    assert np.array_equal(ran.values[f"{mid}.hook_sae_output"], ran.values[f"{MLP_OUT}.hook_sae_input"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_and_parts_of_a_run(family: str) -> None:
    odd = model(family)
    sae = made(5, hook="blocks.0.hook_resid_post", architecture="jumprelu")
    feature = Scale("blocks.0.hook_resid_post.hook_sae_acts_post", 4.0, dims=[3])
    greedy: Any = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "verbose": False}
    plain = odd.generate(TOKENS, **greedy)
    for error_term in (False, True):
        with odd.saes(sae, use_error_term=error_term), odd.intervene(feature):
            whole = odd(TOKENS)
            found = odd.generate(TOKENS, **greedy)
            again = odd.generate(
                TOKENS, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False, use_past_kv_cache=False
            )
            assert np.array_equal(found, again)
            assert not np.array_equal(found, plain)
            residual = odd(TOKENS, stop_at_layer=1)
        with odd.saes(sae, use_error_term=error_term):
            close(odd(residual, start_at_layer=1), whole)  # block 0 and its SAE are left out
        close(odd(residual, start_at_layer=1), whole)


@pytest.mark.parametrize("hook", ["attn.hook_k", "attn.hook_v", "attn.hook_rot_k"])
def test_a_cache_keeps_the_keys_and_values_that_go_on(hook: str) -> None:
    odd, prompt = model("llama"), TOKENS[:, :4]
    heads = odd.cfg.n_key_value_heads or odd.cfg.n_heads
    sae = made(9, hook=f"blocks.1.{hook}", width=heads * odd.cfg.d_head, d_sae=11, reshape_activations="hook_z")
    greedy: Any = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with odd.saes(sae):
        found = odd.generate(prompt, **greedy)
        for length in range(prompt.shape[1], found.shape[1]):
            assert np.array_equal(odd(found[:, :length])[:, -1].argmax(-1), found[:, length])
        whole = odd(found)
        cache = KeyValueCache.init_cache(odd.cfg, batch_size=len(prompt))
        parts = [odd(found[:, :5], past_kv_cache=cache), odd(found[:, 5:], past_kv_cache=cache)]
        close(np.concatenate(parts, 1), whole)
    assert np.abs(whole - odd(found)).max() > 1e-3


def test_a_called_block_runs_with_its_own_sae(odd: HookedTransformer) -> None:
    sae = made(6, hook=RESID)
    _, plain = odd.run_with_cache(TOKENS)
    residual = plain["blocks.1.hook_resid_pre"]
    with odd.saes([sae, made(7, hook="blocks.0.hook_resid_post")]):
        found = odd.blocks[1](residual)
        attention = odd.blocks[1].attn
        assert attention is not None
    close(found, sae(plain[RESID]))


def test_beside_the_model(odd: HookedTransformer) -> None:
    """Read alone: the features are those of an SAE in the model, whose logits are the plain model's to the bit."""
    from graphlens.edits.spliced_sae import SplicedSae
    from graphlens.engine.plan import Plan

    sae, engine = made(8, hook=RESID, architecture="topk", k=4), odd.runner.engine
    post = f"{RESID}.hook_sae_acts_post"
    ran = engine.run({"input_ids": TOKENS}, [post, RESID], plan=Plan(saes=(SplicedSae.of(sae, beside=True),)))
    assert np.array_equal(ran.output, engine.run({"input_ids": TOKENS}, []).output)
    close(ran.values[post], sae.encode(ran.values[RESID]))
    alone = Plan(saes=(SplicedSae.of(sae, beside=True),), reads=(post,))
    assert np.array_equal(
        engine.run({"input_ids": TOKENS}, [post], output=False, plan=alone).values[post], ran.values[post]
    )


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_some_features_alone(odd: HookedTransformer, architecture: str) -> None:
    sae = made(9, hook=RESID, architecture=architecture)
    some = sae.only([17, 3, D_SAE - 1])
    post = f"{RESID}.hook_sae_acts_post"
    _, whole = odd.run_with_cache_with_saes(TOKENS, saes=sae, names_filter=[post])
    logits, cache = odd.run_with_cache_with_saes(TOKENS, saes=some, use_error_term=True)
    close(cache[post], whole[post][..., [17, 3, D_SAE - 1]])
    close(logits, odd(TOKENS))
    # What one feature writes is gone, and nothing else.
    with odd.saes(some, use_error_term=True), odd.intervene(Ablate(post, dims=[1])):
        found = odd(TOKENS)
    with odd.saes(sae, use_error_term=True), odd.intervene(Ablate(post, dims=[3])):
        close(found, odd(TOKENS))


def test_patches_of_features_carry_a_clean_run(odd: HookedTransformer) -> None:
    """With all features and the error patched from another run, what goes on is that run's."""
    sae = made(10, hook=RESID)
    other = np.roll(TOKENS, 1)
    post, error = f"{RESID}.hook_sae_acts_post", f"{RESID}.hook_sae_error"
    with odd.saes(sae, use_error_term=True):
        _, clean = odd.run_with_cache(other)
        with odd.intervene([Patch(post, clean[post]), Patch(error, clean[error])]):
            _, patched = odd.run_with_cache(TOKENS)
    close(patched[f"{RESID}.hook_sae_output"], clean[f"{RESID}.hook_sae_output"])
