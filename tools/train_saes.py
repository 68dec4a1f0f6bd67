"""Train the embedded SAEs of tiny-gpt2 from a harvest and write them to ``models/tiny-gpt2-saes``.

    python tools/train_saes.py [--seed S] [--acts FOLDER] [--only HOOK] [--out FOLDER]

One is a topk SAE of the residual stream, after that block but the last whose features best tell which name comes next. The
others are skip transcoders, one for each MLP: trained with a batch's largest features kept, they keep those above a threshold
(jumprelu).
Everything is seeded: the same steps, seed, thread count and library versions on the same kind of machine give the same files.
Needs torch; it takes some minutes on two cores, and prints how many. Afterwards ``python tools/sae_card.py`` writes the card.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import sae_corpus
import torch
from torch import Tensor
from train_tiny import MODELS

import graphlens
from graphlens import HookedTransformer, Sae

FOLDER = MODELS / "tiny-gpt2-saes"


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights."""

    seed: int = 1
    rows: int = 4000
    d_sae: int = 576
    k: int = 8  # features that a token keeps
    transcoder_d_sae: int = 512
    transcoder_k: int = 24  # of a transcoder, on average
    batch: int = 512  # tokens
    steps: int = 2500
    first_steps: int = 500  # for each layer's SAE, by which the layer is chosen
    learning_rate: float = 3e-3
    auxiliary: float = 1 / 32  # weight of what dead features reconstruct of the error
    k_auxiliary: int = 64
    dead_after: int = 100  # steps without being active
    threads: int = 1
    prompts: int = 1500  # by which the layer is chosen


class Dictionary(torch.nn.Module):
    """Features of activations, and what they write: of an SAE the activations, of a transcoder an MLP's output."""

    def __init__(self, recipe: Recipe, x: Tensor, y: Tensor, transcoder: bool) -> None:
        super().__init__()
        width, self.transcoder = x.shape[1], transcoder
        self.k = recipe.transcoder_k if transcoder else recipe.k
        features = recipe.transcoder_d_sae if transcoder else recipe.d_sae
        rows = torch.nn.functional.normalize(centred(torch.randn(features, width)), dim=1)
        self.W_dec = torch.nn.Parameter(rows)
        self.W_enc = torch.nn.Parameter(rows.T.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(features))
        self.b_dec = torch.nn.Parameter(y.mean(0))
        if transcoder:  # begins as the best linear map, so that features are for what is not linear
            mean = x.mean(0)
            fitted = torch.linalg.lstsq(x - mean, y - y.mean(0)).solution
            self.W_skip = torch.nn.Parameter(fitted.T.clone())
            with torch.no_grad():
                self.b_dec -= mean @ fitted

    def pre(self, x: Tensor) -> Tensor:
        """Pre-activations, [token, feature]."""
        return (x if self.transcoder else x - self.b_dec) @ self.W_enc + self.b_enc

    def kept(self, pre: Tensor) -> Tensor:
        """The features that are kept: each token's ``k`` largest; of a transcoder a batch's, ``k`` a token on average."""
        found = pre.relu()
        if self.transcoder:
            flat = found.flatten()
            best = flat.topk(self.k * len(pre))
            return torch.zeros_like(flat).scatter(0, best.indices, best.values).view_as(found)
        best = found.topk(self.k, dim=1)
        return torch.zeros_like(found).scatter(1, best.indices, best.values)

    def written(self, features: Tensor, x: Tensor) -> Tensor:
        """What features write."""
        made = features @ self.W_dec + self.b_dec
        return made + x @ self.W_skip.T if self.transcoder else made


def centred(x: Tensor) -> Tensor:
    """Activations without their mean over the width: every norm of the model takes it away."""
    return x - x.mean(-1, keepdim=True)


def train(recipe: Recipe, steps: int, x: Tensor, y: Tensor | None = None) -> Dictionary:
    """A trained dictionary, of ``x`` [token, width] itself or, as a transcoder, of what it becomes, ``y``."""
    torch.manual_seed(recipe.seed)
    transcoder, target = y is not None, x if y is None else y
    made = Dictionary(recipe, x, target, transcoder)
    optimizer = torch.optim.Adam(made.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.999))
    last = torch.zeros(len(made.b_enc))
    variance = float((target - target.mean(0)).square().sum(1).mean())
    for step, places in enumerate(batches(recipe, len(x), steps)):
        for group in optimizer.param_groups:  # a short warm-up, and a straight line down over the last third
            group["lr"] = recipe.learning_rate * min((step + 1) / 50, 1.0, 3 * (steps - step) / steps)
        some, wanted = x[places], target[places]
        pre = made.pre(some)
        features = made.kept(pre)
        error = wanted - made.written(features, some)
        loss = error.square().sum(1).mean() / variance
        dead = step - last > recipe.dead_after
        if dead.any():
            best = pre[:, dead].relu().topk(min(recipe.k_auxiliary, int(dead.sum())), dim=1)
            rest = torch.zeros_like(pre[:, dead]).scatter(1, best.indices, best.values) @ made.W_dec[dead]
            left = error.detach()
            loss = loss + recipe.auxiliary * (left - rest).square().sum() / left.square().sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            last[(features > 0).any(0)] = step
            made.W_dec.copy_(torch.nn.functional.normalize(made.W_dec, dim=1))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            share = error.square().sum(1).mean() / variance
            print(f"  step {step + 1}: {share:.4f} of the variance left, {int(dead.sum())} dead", flush=True)
    return made


def batches(recipe: Recipe, tokens: int, steps: int) -> Iterator[Tensor]:
    """The places of each step's tokens: all of them in a random order, again and again."""
    generator = torch.Generator().manual_seed(recipe.seed)
    given = 0
    while True:
        for places in torch.randperm(tokens, generator=generator).split(recipe.batch):
            if given == steps:
                return
            given += 1
            yield places


@torch.no_grad()
def as_sae(made: Dictionary, recipe: Recipe, hook: str, scale: float, x: Tensor, hook_out: str | None = None) -> Sae:
    """A dictionary of scaled activations as an SAE of the model's own.

    Args:
        made: The dictionary, of activations (of a transcoder: of outputs) times ``scale``.
        recipe: What made it.
        hook: The hook point that it reads.
        scale: The factor. Features are in the model's units afterwards: a feature's activation is the length that it writes.
        x: Activations that it read, by which a transcoder's threshold is found.
        hook_out: The hook point that a transcoder stands for.
    """
    weights = {
        "W_enc": centred(made.W_enc.T).T,  # what a norm takes away is not read, and not written
        "b_enc": made.b_enc,
        "W_dec": centred(made.W_dec),
        "b_dec": centred(made.b_dec) / scale,
    }
    if made.transcoder:
        least = []
        for some in x[: 64 * recipe.batch].split(recipe.batch):
            kept = made.kept(made.pre(some))
            least.append(float(kept[kept > 0].min()))
        weights["threshold"] = torch.full((len(made.b_enc),), sum(least) / len(least)) / scale
        weights["W_skip"] = centred(made.W_skip.T).T / scale
        weights["W_enc"] = weights["W_enc"] / scale
    weights["b_enc"] = weights["b_enc"] / scale
    arrays = {name: array.contiguous().numpy() for name, array in weights.items()}
    order = [arrays.pop(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    about = {"model_name": sae_corpus.MODEL, "context_size": sae_corpus.ROW, "prepend_bos": True}
    if made.transcoder:
        return Sae.from_arrays(*order, hook, "jumprelu_skip_transcoder", hook_out=hook_out, **arrays, **about)
    return Sae.from_arrays(*order, hook, "topk", k=recipe.k, **about)


def names_found(sae: Sae, model: HookedTransformer, recipe: Recipe) -> float:
    """How well single features tell which name comes next: the best feature's F1 for each name, their mean.

    A feature says that it does by an activation of more than half of its largest.
    """
    ids, examples = sae_corpus.prompts(recipe.prompts, seed=recipe.seed + 2)
    with tempfile.TemporaryDirectory() as place:
        found = graphlens.harvest(model, ids, sae.cfg.hook, Path(place) / "ends", positions="last", verbose=False)
        features = sae.encode(found[sae.cfg.hook][:])
    active = features > features.max(0) / 2
    best = []
    for name in {example.io for example in examples}:
        right = np.array([example.io == name for example in examples])
        both = (active & right[:, None]).sum(0)
        best.append((2 * both / np.maximum(active.sum(0) + right.sum(), 1)).max())
    return float(np.mean(best))


def main() -> None:
    """Train and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="(default: %(default)s)")
    parser.add_argument(
        "--acts", type=Path, help="folder of the harvest, which is kept and gone on with (default: none is)"
    )
    parser.add_argument("--only", metavar="HOOK", help="train one: with --acts, several can be trained side by side")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: the embedded one)")
    arguments = parser.parse_args()
    recipe = Recipe(seed=arguments.seed)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    model = HookedTransformer.from_pretrained_no_processing(sae_corpus.MODEL)
    layers = range(model.cfg.n_layers)
    names = [
        f"blocks.{i}.{name}" for i in layers for name in ("ln2.hook_normalized", "hook_mlp_out", "hook_resid_post")
    ]
    with tempfile.TemporaryDirectory() as place:
        texts = sae_corpus.rows(recipe.rows, seed=recipe.seed)
        acts = graphlens.harvest(
            model, texts, names, arguments.acts or Path(place) / "acts", dtype="float16", resume=True
        )
        print(f"{acts}, {time.perf_counter() - started:.0f} s", flush=True)

        def read(hook: str) -> Tensor:
            return centred(torch.from_numpy(acts[hook][:].astype(np.float32)))

        def scale_of(x: Tensor) -> float:
            return math.sqrt(x.shape[1]) / float((x - x.mean(0)).norm(dim=1).mean())

        def resid(layer: int, steps: int) -> Sae:
            hook = f"blocks.{layer}.hook_resid_post"
            x = read(hook)
            scale = scale_of(x)
            return as_sae(train(recipe, steps, x * scale), recipe, hook, scale, x)

        def transcoder(layer: int) -> Sae:
            hook, hook_out = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
            x, y = read(hook), read(hook_out)
            scale = scale_of(y)
            return as_sae(train(recipe, recipe.steps, x, y * scale), recipe, hook, scale, x, hook_out)

        def chosen() -> int:
            scores = {}
            for layer in layers[:-1]:  # after the last one no block is left that could read a feature
                scores[layer] = names_found(resid(layer, recipe.first_steps), model, recipe)
                print(f"block {layer}: names {scores[layer]:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
            return max(scores, key=scores.__getitem__)

        makers = {f"blocks.{layer}.hook_mlp_out": partial(transcoder, layer) for layer in layers}
        if arguments.only not in makers:
            at = chosen() if arguments.only is None else int(arguments.only.split(".")[1])
            makers[f"blocks.{at}.hook_resid_post"] = partial(resid, at, recipe.steps)
        for hook, make in makers.items():
            if arguments.only in (None, hook):
                sae = make()
                shutil.rmtree(arguments.out / hook, ignore_errors=True)
                sae.save(arguments.out / hook)
                print(f"wrote {arguments.out / hook}, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
