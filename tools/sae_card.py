"""Measure the embedded SAEs of tiny-gpt2 and write their card, or check the card that is there.

    python tools/sae_card.py            # measure, write models/tiny-gpt2-saes/README.md
    python tools/sae_card.py --check    # measure, exit 1 where the card says something else

Every figure on the card comes from this run, on rows that the training of the SAEs did not have. It takes a minute on two cores.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sae_corpus
from tiny_card import differences
from tiny_words import NAMES
from train_saes import FOLDER, Recipe

from graphlens import Ablate, HookedTransformer, Sae

FLOOR = 0.95  # of the loss that each must recover
SEED = 1000  # of the rows and prompts that are measured
ROWS, PROMPTS = 512, 2000
SHOWN, STRONGEST, BEFORE = 2, 4, 6  # features of each SAE, places of each feature, tokens before each place
FEW = 2e-3  # a feature that is active at less of the tokens is not shown
NAMED = ("Anna", "Rose", "Mary", "John", "Tom")
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Figures:
    """What is measured of an SAE; shares are of 1."""

    sae: Sae
    l0: float  # features active at a token, mean
    dead: int  # features that are active at no token
    explained: float  # of the variance of what it stands for
    loss: float  # nats per token with it in the model
    ablated: float  # with zeros in place of what it stands for
    recovered: float  # (ablated - loss) / (ablated - intact)
    features: list[
        tuple[int, float, list[str], list[str]]
    ]  # number, share of tokens, what it writes for, where it is strongest


class Measured:
    """The model on the rows that are measured."""

    def __init__(self, folder: Path) -> None:
        self.model = HookedTransformer.from_pretrained_no_processing(sae_corpus.MODEL)
        self.saes = [Sae.from_folder(path) for path in sorted(folder.iterdir()) if path.is_dir()]
        self.rows = sae_corpus.rows(ROWS, SEED)
        self.intact = self.loss()

    def loss(self, *saes: Sae, ablate: str | None = None) -> float:
        """Nats per token, of all rows."""
        found = []
        with self.model.saes(list(saes)), self.model.intervene([Ablate(ablate)] if ablate else []):
            found = [float(self.model(some, return_type="loss")) for some in np.array_split(self.rows, 16)]
        return float(np.mean(found))

    def activations(self, hook: str) -> Array:
        """The activations of all rows at a hook point, [token, width]."""
        parts = [
            self.model.run_with_cache(some, names_filter=hook)[1][hook].reshape(-1, self.model.cfg.d_model)
            for some in np.array_split(self.rows, 16)
        ]
        found: Array = np.concatenate(parts)
        return found

    def figures(self, sae: Sae) -> Figures:
        """What is measured of an SAE."""
        x, wanted = self.activations(sae.cfg.hook), self.activations(sae.cfg.writes)
        features = sae.encode(x)
        # A mean over the width is nothing to the model, whose norms take it away: the SAEs leave it out.
        wanted = wanted - wanted.mean(-1, keepdims=True)
        left = wanted - sae(x)
        explained = 1 - float(np.square(left).sum() / np.square(wanted - wanted.mean(0)).sum())
        loss, ablated = self.loss(sae), self.loss(ablate=sae.cfg.writes)
        active = features > 0
        return Figures(
            sae,
            float(active.sum(-1).mean()),
            int((~active.any(0)).sum()),
            explained,
            loss,
            ablated,
            (ablated - loss) / (ablated - self.intact),
            [self.shown(sae, features, int(each)) for each in self.clearest(features)],
        )

    def clearest(self, features: Array) -> list[int]:
        """The features that do most, of those whose strongest places are all at one token."""
        tokens, rate, found = self.rows.reshape(-1), (features > 0).mean(0), []
        for feature in np.argsort(-features.sum(0)):
            places = np.argsort(-features[:, feature], kind="stable")[:20]
            if rate[feature] >= FEW and len(set(tokens[places])) == 1 and tokens[places[0]] != tokens[0]:
                found.append(int(feature))
        return found[:SHOWN]

    def shown(self, sae: Sae, features: Array, feature: int) -> tuple[int, float, list[str], list[str]]:
        """A feature for the card."""
        contexts: list[str] = []
        for place in np.argsort(-features[:, feature], kind="stable"):
            row, at = divmod(int(place), sae_corpus.ROW)
            before, token = self.rows[row, max(0, at - BEFORE) : at], self.rows[row, at]
            said = self.text([token])
            text = f"{self.text(before)}{' ' * said.startswith(' ')}**{said.strip()}**"
            if text not in contexts:
                contexts.append(text)
            if len(contexts) == STRONGEST:
                break
        return feature, float((features[:, feature] > 0).mean()), self.written(sae, feature), contexts

    def text(self, tokens: npt.ArrayLike) -> str:
        """Tokens as text that stands in a table."""
        return str(self.model.to_string(np.asarray(tokens))).replace("|", "\\|").replace("\n", " ")

    def written(self, sae: Sae, feature: int) -> list[str]:
        """The tokens that a feature's decoder row raises most, through the final norm and the unembedding."""
        raised = sae.W_dec[feature] * self.model.weights["ln_final.w"] @ self.model.weights["unembed.W_U"]
        return [f"`{self.text([token])}`" for token in np.argsort(-raised)[:3]]

    def names(self, sae: Sae) -> dict[str, tuple[int, float]]:
        """For each name the feature that best tells that it comes next, and its F1 over prompts that end before a name."""
        ids, examples = sae_corpus.prompts(PROMPTS, SEED)
        ends = np.concatenate(
            [
                self.model.run_with_cache(np.array([row]), names_filter=sae.cfg.hook)[1][sae.cfg.hook][:, -1]
                for row in ids
            ]
        )
        features, found = sae.encode(ends), {}
        active = features > features.max(0) / 2
        for name in NAMES:
            right = np.array([example.io == name for example in examples])
            both = (active & right[:, None]).sum(0)
            scores = 2 * both / np.maximum(active.sum(0) + right.sum(), 1)
            found[name] = (int(scores.argmax()), float(scores.max()))
        return found


def render(measured: Measured, every: list[Figures]) -> str:
    """The card."""
    recipe = Recipe()
    (resid,) = (each for each in every if not each.sae.cfg.is_transcoder)
    transcoders = [each.sae for each in every if each.sae.cfg.is_transcoder]
    together, gone = measured.loss(*transcoders), len(transcoders)
    names = measured.names(resid.sae)
    rows = "\n".join(
        f"| `{each.sae.cfg.writes}` | {each.sae.cfg.architecture} | {each.l0:.1f} | {each.explained:.3f} | {each.loss:.3f} | "
        f"{each.ablated:.3f} | {each.recovered:.3f} | {each.dead} |"
        for each in every
    )
    features = "\n".join(
        f"| `{each.sae.cfg.writes}` | {number} | {share:.1%} | {' '.join(writes)} | {'; '.join(contexts)} |"
        for each in every
        for number, share, writes, contexts in each.features
    )
    told = "\n".join(f"| {name} | {names[name][0]} | {names[name][1]:.2f} |" for name in NAMED)
    good = sum(score >= 0.9 for _, score in names.values())
    return f"""---
license: mit
library_name: graphlens
tags: [sparse-autoencoder, transcoder, interpretability, tiny]
---

# tiny-gpt2-saes

Sparse dictionaries of [tiny-gpt2](../tiny-gpt2/README.md): a topk SAE of its residual stream, and a skip transcoder for each MLP,
of {recipe.d_sae} and {recipe.transcoder_d_sae} features. They are for tests, examples and teaching.

```python
from graphlens import HookedTransformer, Sae

model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
sae = Sae.from_pretrained("tiny-gpt2-saes", "{resid.sae.cfg.writes}")
logits, cache = model.run_with_cache_with_saes("When John and Mary", saes=sae)
```

Each folder is in SAELens's layout: `cfg.json` and `sae_weights.safetensors`, float32. Licence: MIT.

## Figures

All from `tools/sae_card.py`, which writes this file; `--check` recomputes them. They are of {ROWS} rows of {sae_corpus.ROW} \
tokens that
the training did not have.

- Loss: nats per token; {measured.intact:.3f} without an SAE. Ablated: the loss with zeros in place of what the SAE stands for.
- Recovered: (ablated - loss) / (ablated - {measured.intact:.3f}).
- L0: features active at a token, mean. Explained: share of the variance. Dead: features that are active at none of the tokens.

| stands for | architecture | L0 | explained | loss | ablated | recovered | dead |
|---|---|---|---|---|---|---|---|
{rows}

With all {gone} transcoders in place of the MLPs the loss is {together:.3f}.

## Features

Where each is strongest, the token in bold; at which share of tokens it is active; and the tokens that its decoder row raises
most through the final norm and the unembedding. Chosen by a rule: those that write most, of those whose strongest places are all
one token.

| SAE | feature | active | writes for | strongest at |
|---|---|---|---|---|
{features}

The feature of `{resid.sae.cfg.writes}` that best tells which name comes next, at the end of {PROMPTS:,} prompts whose
next word is a name. F1 is of "its activation is more than half of its largest" against "this name comes". Of {len(NAMES)} \
names {good} have
a feature with 0.90 or more; most names share theirs with others.

| name | feature | F1 |
|---|---|---|
{told}

## Training

By `tools/train_saes.py`, from a harvest of {recipe.rows:,} rows of {sae_corpus.ROW} tokens, made as the model's training text:
{recipe.steps:,} steps of Adam on {recipe.batch} tokens, peak rate {recipe.learning_rate}, seed {recipe.seed}. The SAE keeps the
{recipe.k} largest features of each token. The transcoders kept {recipe.transcoder_k} a token on average, the largest \
of each batch, and
keep those above a threshold since. The residual stream's layer is that one, but for the last, in which single features best tell
which name comes next.

What they read and write has no mean over the width, which every norm of the model takes away. So they are as good for the model
with processed weights (`HookedTransformer.from_pretrained`).
"""


def main() -> int:
    """Write or check the card; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the card instead of writing it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the SAEs' folder (default: the embedded one)")
    arguments = parser.parse_args()
    measured = Measured(arguments.folder)
    every = [measured.figures(sae) for sae in measured.saes]
    fresh, path = render(measured, every), arguments.folder / "README.md"
    problems = [
        f"{each.sae.cfg.writes} recovers {each.recovered:.3f}, less than {FLOOR}"
        for each in every
        if each.recovered < FLOOR
    ]
    if arguments.check:
        problems += differences(path.read_text(encoding="utf-8"), fresh)
    else:
        path.write_text(fresh, encoding="utf-8")
        print(f"wrote {path}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
