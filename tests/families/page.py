"""What the parity matrix measures of a variant, and docs/models.md, which is made of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphlens import HookedEncoder, HookedTransformer
from graphlens.export.checkpoint import read_checkpoint
from graphlens.export.families import Family, families
from tests.families import encoders
from tests.families.comparing import Difference, against_lens, against_transformers, prompt
from tests.families.exports import checkpoint_of, hooked_of, reference_of
from tests.families.lens import lens_of
from tests.families.refused import REFUSED
from tests.families.torch_hooks import against_torch_hooks
from tests.families.variants import VARIANTS

HEAD = "| variant | hook points | transformers' logits | transformers, by torch hooks | TransformerLens 3.9 |"


@dataclass(frozen=True)
class Measured:
    """The largest differences of a variant, each as a share of max(1, max|reference|).

    Attributes:
        name: The variant.
        architecture: Its architecture.
        hooks: How many hook points it has.
        logits: From transformers' logits.
        by_hooks: From transformers with torch hooks.
        lens: From TransformerLens at every hook point, read and edited; None where that is no oracle.
        worst: The largest of them, and where.
        seconds: How long the export and the comparison took.
    """

    name: str
    architecture: str
    hooks: int
    logits: float
    by_hooks: float
    lens: float | None
    worst: Difference
    seconds: float

    def row(self) -> str:
        """A line of the table."""
        lens = "-" if self.lens is None else f"{self.lens:.1e}"
        return f"| {self.name} | {self.hooks} | {self.logits:.1e} | {self.by_hooks:.1e} | {lens} |"


def measure(name: str, root: Path) -> Measured:
    """Exports a variant into ``root`` and compares all of it."""
    started = time.perf_counter()
    folder = checkpoint_of(name, root)
    checkpoint = read_checkpoint(folder)
    spec = checkpoint.family.spec_of(checkpoint.hf_config(), name)
    ours = HookedTransformer.from_onnx(hooked_of(name, root), "cpu")
    tokens, reference = prompt(ours.cfg.d_vocab, 2, 11), reference_of(folder)
    logits = _worst(against_transformers(ours, reference))
    by_hooks = _worst(against_torch_hooks(ours, reference, spec, tokens))
    lens = None if VARIANTS[name].lens is None else _worst(against_lens(ours, lens_of(name, folder), tokens))
    return Measured(
        name=name,
        architecture=checkpoint.family.architecture,
        hooks=len(ours.hook_points()),
        logits=logits.share,
        by_hooks=by_hooks.share,
        lens=None if lens is None else lens.share,
        worst=_worst(found for found in (logits, by_hooks, lens) if found is not None),
        seconds=time.perf_counter() - started,
    )


def measure_encoder(name: str, root: Path) -> Measured:
    """The same of an encoder."""
    started = time.perf_counter()
    ours, theirs = HookedEncoder.from_onnx(encoders.hooked_of(name, root), "cpu"), encoders.reference_of(name, root)
    logits = _worst(encoders.against_transformers(name, ours, theirs))
    by_hooks = _worst(encoders.against_torch_hooks(name, ours, theirs))
    lens = _worst(encoders.against_lens(ours, encoders.lens_of(theirs)))
    return Measured(
        name=name,
        architecture=read_checkpoint(encoders.checkpoint_of(name, root)).family.architecture,
        hooks=len(ours.hook_points()),
        logits=logits.share,
        by_hooks=by_hooks.share,
        lens=lens.share,
        worst=_worst((logits, by_hooks, lens)),
        seconds=time.perf_counter() - started,
    )


def _worst(found: Iterable[Difference]) -> Difference:
    """The largest difference."""
    return max(found, key=lambda difference: difference.share)


OWN = """\
Models from TransformerLens's own configs: toy models, and the checkpoints that its author trained
([families.md](families.md)). `tests/parity/test_lens_configs.py` compares every hook point of them, read and edited, with
TransformerLens 3.9.
"""


def page(measured: Sequence[Measured], made_by: str) -> str:
    """docs/models.md.

    Args:
        measured: The figures of all variants.
        made_by: The versions and the commit that they were measured with.
    """
    lines = [
        "# Models",
        "",
        "Every architecture that graphlens exports, tried on tiny random models of odd sizes. A figure is the largest",
        "difference there was, as a share of max(1, largest reference value); 5e-5 is allowed. Logits are compared on five",
        "inputs, two of them padded. At every hook point the activation is read and then replaced by another, here and in",
        "TransformerLens 3.9; where that has no right answer, in transformers with torch hooks, which reach most hook points.",
        "",
        f"This page is written by `python -m tests.families --all --table docs/models.md`, {made_by}.",
        "[families.md](families.md) shows how to add an architecture of your own.",
        "",
        "![The largest differences of each architecture from transformers and TransformerLens 3.9](pictures/models.svg)",
    ]
    for family in families():
        own = [found for found in measured if found.architecture == family.architecture]
        lines += ["", f"## {family.architecture}", ""]
        lines += OWN.splitlines() if family.own else [HEAD, "|---|---|---|---|---|", *(found.row() for found in own)]
        reasons = [(found.name, VARIANTS[found.name].why_not) for found in own if found.lens is None]
        if reasons:
            told = "; ".join(f"for {name}, {why}" for name, why in reasons)
            lines += ["", f"TransformerLens 3.9 is no oracle here: {told}."]
        lines += ["", *_names(family)]
    lines += ["", "## What is refused", "", "| what | architecture's config | why |", "|---|---|---|"]
    lines += [f"| {what} | {refused.config} | {refused.why} |" for what, refused in REFUSED.items()]
    lines += [
        "",
        "Refused as well, whatever the architecture: a config key that may change the computation and that graphlens does not",
        "know, quantised weights (GPTQ, AWQ, bitsandbytes, GGUF), tensors that the model has no use for, and architectures that",
        "are not on this page.",
    ]
    return "\n".join(lines) + "\n"


def _names(family: Family) -> list[str]:
    """The names on the hub that TransformerLens knows, with their aliases, as a paragraph."""
    aliases: dict[str, list[str]] = {}
    for alias, official in family.aliases.items():
        aliases.setdefault(official, []).append(alias)
    if not aliases:
        return ["TransformerLens 3.9 has no names of this architecture; any name on the hub or folder opens."]
    told = [f"`{name}` ({', '.join(sorted(set(also) - {name}))})".replace(" ()", "") for name, also in aliases.items()]
    return ["<details><summary>Official names and aliases</summary>", "", ", ".join(told) + ".", "", "</details>"]
