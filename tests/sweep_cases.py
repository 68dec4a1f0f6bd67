"""What the tests of sweeps share: the model and its prompts, sites, metrics, and the loop of whole runs that a sweep equals."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from graphlens.errors import InputError
from graphlens.experiments.stages import STAGES
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Metric, Probability
from graphlens.patching import Site, SweepResult, sweep
from tests.intervention_specs import fields_of, patch_of, shape_of
from tests.models import MODEL

CFG = MODEL.cfg
RNG = np.random.default_rng(11)
CLEAN, CORRUPTED = (RNG.integers(0, CFG.d_vocab, (3, 7)) for _ in range(2))
PADDING = np.ones((3, 7), int)
PADDING[0, :3] = PADDING[2, :1] = 0
MASKS = pytest.mark.parametrize("options", [{}, {"attention_mask": PADDING}], ids=["whole", "left-padded"])
# The kinds of hook point whose patches are recomputed, those of other architectures aside.
KINDS = [tail for tail in STAGES if tail not in ("attn.hook_rot_q", "attn.hook_rot_k", "mlp.hook_pre_linear")]
# A module's tests of one kind of hook point follow one another, so that they find each other's sessions open.
TAILS = pytest.mark.parametrize("tail", KINDS, scope="module")
DIFFERENCE = LogitDiff([5, 17, 200], [9, 300, 4])
PROMPTS = (
    "When John and Mary went to the store, John gave a drink to",
    "When John and Mary went to the store, Mary gave a drink to",
)


@functools.cache
def clean_activations() -> Mapping[str, Any]:
    """The clean run's activations: with the flagged hook point, without padding. Not to be changed."""
    MODEL.set_use_attn_result(True)
    _, cache = MODEL.run_with_cache(CLEAN)
    MODEL.set_use_attn_result(False)
    return dict(cache)


def flags_off() -> None:
    """Takes back the flags that tests of sweeps set."""
    for flag in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        getattr(MODEL, f"set_use_{flag}")(False)


# The loop: whole runs, one patch each


def in_one_session(tokens: Any, items: Sequence[Any], **options: Any) -> None:
    """Runs interventions at one kind of hook point in all blocks at once: the session that it opens serves runs with any one
    of them, which would open one for the first block, and then another for all."""
    one_of_each = {item.hook: item for item in items}
    if len({hook.split(".", 2)[-1] for hook in one_of_each}) == 1:
        MODEL.run_with_interventions(tokens, list(one_of_each.values()), **options)


def loop(tokens: Any, sites: Sequence[Site], values: Any, metrics: Any, **options: Any) -> Any:
    """Each metric [metric, site, ...] (or [site, ...] of one alone) with ``values`` (by hook name) patched at each site."""
    mask = options.get("attention_mask")
    every = [
        metric.masked(mask) if isinstance(metric, Metric) else metric
        for metric in (metrics if isinstance(metrics, list) else [metrics])
    ]
    rows = []
    hooks = MODEL.runner.engine.hooks(MODEL.runner.plan())
    patches = [patch_of(site, values[site.hook], hooks[site.hook].axes) for site in sites]
    in_one_session(tokens, patches, **options)
    for patch in patches:
        logits = MODEL.run_with_interventions(tokens, patch, **options)
        rows.append([np.asarray(metric(logits)) for metric in every])
    found = np.stack([np.stack(column) for column in zip(*rows, strict=True)])
    return found if isinstance(metrics, list) else found[0]


def apart(found: Any, expected: Any, baselines: Mapping[str, Any]) -> float:
    """The largest difference, as a share of the largest value there is."""
    assert found.shape == expected.shape
    known = [np.abs(value).max() for value in baselines.values() if value is not None]
    return float(np.abs(found - expected).max() / max(np.abs(found).max(), np.abs(expected).max(), *known))


def agrees(result: SweepResult, expected: Any, quick: bool | None = True) -> None:
    """Within 1e-5 of each metric's scale; and the quick path was taken, or (``quick=False``) it says why not."""
    if "metric" in result.axes:
        for name, other in zip(result.labels["metric"], expected, strict=True):
            one = result.sel(metric=name)
            assert apart(one.values, other, one.baselines) <= 1e-5, name
    else:
        assert apart(result.values, expected, result.baselines) <= 1e-5
    if quick is not None:
        assert ("general_path" not in result.metadata) == quick, result.metadata


def at(tail: str, layer: int) -> str:
    return tail if tail in ("hook_embed", "hook_pos_embed") else f"blocks.{layer}.{tail}"


def places(tail: str) -> list[Site]:
    """Sites of every form at one kind of hook point: whole and in part, early and late, in the first block and the last."""
    part: dict[str, list[Any]] = {"position": [None, 3, -2, [1, 4], slice(2, 6), slice(None, None, 3)]}
    axes, _ = shape_of(MODEL, at(tail, 0), 3, 7)
    fields = fields_of(axes)
    part["head"] = [None, 1, -1, [0, 3], slice(1, 3), [True, False, False, True]] if "heads" in fields else [None]
    # At scores and patterns these are keys, at the MLP's neurons.
    part["dims"] = [None, 2, [4, 1], [0, 5, 3], slice(0, 4), None] if "dims" in fields else [None]
    found = []
    for layer in (0, 2, 3) if "embed" not in tail else (0,):
        for turn in range(6):
            chosen = {name: some[(turn + shift) % len(some)] for shift, (name, some) in enumerate(part.items())}
            found.append(Site(at(tail, layer), **chosen))
        found += [Site(at(tail, layer)), Site(at(tail, layer), position=[1, 4], head=-1 if "heads" in fields else None)]
    return found


# Metrics and sites


def entropy(logits: Any) -> Any:
    """A metric of one's own, of all logits."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return -(weights * np.log(weights)).sum(-1).mean()


def scaled(logits: Any) -> float:
    return float(logits[1, 2, 7] - 2 * logits[0, -1, 30])


SOME = [
    *(Site("resid_pre", layer, position=place) for layer in (0, 3) for place in (0, 3, 6)),
    *(Site("z", layer, head=2) for layer in range(4)),
    Site("blocks.1.mlp.hook_post", dims=[3, 100, 511]),
    Site("pattern", 2, position=4, head=1, dims=0),
    Site("k", 3, position=5),
    Site("attn_scores", 3, position=slice(2, None)),
]
FEW = [SOME[1], SOME[7], SOME[-1], SOME[-3]]
METRICS: dict[str, Any] = {
    "difference": DIFFERENCE,
    "not the last": LogitDiff(5, 9, position=3),
    "positions": LogitDiff(5, 9, position=[3, -1, 1], reduction="none"),
    "probability": Probability([5, 8, 400], position=4),
    "probability per prompt": Probability(77, reduction="none"),
    "cross-entropy": CrossEntropy([1, 2, 3], position=[6, 2, 4]),
    "loss": CrossEntropy(CORRUPTED, position=None),
    "loss per prompt": CrossEntropy(CORRUPTED, position=None, reduction="none"),
    "KL": KLDivergence(MODEL(CLEAN)),
    "KL at one position": KLDivergence(MODEL(CLEAN)[:, 3], position=3, reduction="none"),
    "KL everywhere": KLDivergence(MODEL(CLEAN), position=None),
    "a function of all logits": entropy,
    "a function of a few": scaled,
}


# Refusals


def refused(kind: type[Exception] = InputError, **changes: Any) -> str:
    """The message with which a sweep refuses to start, or ends."""
    asked: dict[str, Any] = {
        **{"corrupted_tokens": CORRUPTED, "sites": SOME, "source": "zero", "metric": DIFFERENCE, "verbose": False},
        **changes,
    }
    with pytest.raises(kind) as error:
        sweep(MODEL, **asked)
    return str(error.value)
