"""Attribution patching over every head and position, against the exact sweep of the same sites."""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Row, Setup, against_floor, rounds, timed
from tools.bench.sweeps import LENGTH, random_prompts

FASTER = 20.0


def run(setup: Setup) -> Findings:
    """Milliseconds of the estimate and of the sweep, and how well the one tells the other."""
    from graphlens import HookedTransformer
    from graphlens.attribution import attribution_patch, compare_with_sweep
    from graphlens.metrics import LogitDiff
    from graphlens.patching import act_patch_sites, sweep

    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    prompts = random_prompts(setup.model.d_vocab, 1, min(LENGTH, setup.model.n_ctx))
    _, cache = model.run_with_cache(prompts.clean)
    sites = act_patch_sites(model, prompts.corrupted, "attn_head_out_by_pos")
    given = (model, prompts.corrupted, sites, cache, LogitDiff(*prompts.answers))
    found = compare_with_sweep(attribution_patch(*given, verbose=False), sweep(*given, verbose=False))
    contenders = {
        "estimate": timed(lambda: attribution_patch(*given, verbose=False)),
        "sweep": timed(lambda: sweep(*given, verbose=False)),
    }
    times = rounds(contenders, setup.repeats)
    label = f"{len(sites.sites):,} sites (layer x position x head), b1 s{prompts.corrupted.shape[1]}"
    rows: list[Row] = [against_floor(label, times["estimate"], times["sweep"], 1 / FASTER)]
    note = (
        f"Correlation of estimated and exact effects {found.correlation:.3f}, slope {found.slope:.2f} (random weights)."
    )
    return Findings(rows, "the exact sweep", (note,))


CASE = Case(run, repeats=3)
