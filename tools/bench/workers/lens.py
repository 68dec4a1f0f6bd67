"""TransformerLens: HookedTransformer of 3.9, TransformerBridge of 4.x, weights unprocessed in both."""

from __future__ import annotations

import logging
import sys
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.bench.workers import hugging
from tools.bench.workers.protocol import Job, Work, logits_check, opened_twice


def _open(checkpoint: str) -> Any:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if metadata.version("transformer-lens").startswith("3."):
        sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "parity"))
        from lens_oracle import oracle

        model = oracle(checkpoint)
        # Without a tokenizer, generate with a KV cache gives other tokens than without one.
        model.tokenizer = hugging.some_tokenizer()
        return model
    return _bridge(hugging.load(checkpoint), checkpoint)


def _bridge(plain: Any, checkpoint: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    plain.config._name_or_path = "gpt2"
    return TransformerBridge.boot_transformers(checkpoint, hf_model=plain, tokenizer=None, device="cpu")


def _without_head(checkpoint: str, layer: int, head: int) -> Any:
    """The model with one head's rows of the output projection at zero."""
    if metadata.version("transformer-lens").startswith("3."):
        model = _open(checkpoint)
        model.blocks[layer].attn.W_O[head] = 0
        return model
    return _bridge(hugging.load_without_head(checkpoint, layer, head), checkpoint)


def _sweep(model: Any, job: Job, kind: str) -> Work:
    """transformer_lens.patching's own function; ``job.layers`` are passed as its index_df."""
    import pandas
    import torch
    from transformer_lens import patching

    from tools.bench.sweeps import KINDS

    patching.tqdm = lambda rows: rows
    corrupted = torch.tensor(job.corrupted)
    correct, incorrect = job.answers
    with torch.inference_mode():
        _, clean_cache = model.run_with_cache(torch.tensor(job.tokens))
    function = getattr(patching, f"get_act_patch_{kind}")
    options: dict[str, Any] = {}
    shape = KINDS[kind].shape(model.cfg.n_layers, corrupted.shape[1], model.cfg.n_heads)
    if job.layers is not None:
        cells = [(layer, *rest) for layer in job.layers for rest in _indices(shape[1:])]
        frame = pandas.DataFrame(cells, columns=["layer", *KINDS[kind].axes])
        options = {"index_axis_names": None, "index_df": frame}
        shape = (len(job.layers), *shape[1:])

    def metric(logits: Any) -> Any:
        return (logits[:, -1, correct] - logits[:, -1, incorrect]).mean()

    def work() -> Any:
        with torch.inference_mode():
            return function(model, corrupted, clean_cache, metric, **options)

    return Work(work, lambda values: {"values": values.reshape(shape).tolist()})


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    from itertools import product

    return list(product(*(range(size) for size in shape)))


def _harvest(model: Any, job: Job) -> dict[str, Work]:
    """The loop that people write: a run, the activations in float16, a file."""
    import torch

    from tools.bench.harvest_loop import works

    ids = torch.tensor(job.tokens)

    def run(names: list[str], stop: int | None, batch: int, folder: Path) -> Any:
        folder.mkdir()
        options = {} if stop is None else {"stop_at_layer": stop}
        for first in range(0, len(ids), batch):
            with torch.inference_mode():
                _, cache = model.run_with_cache(
                    ids[first : first + batch], names_filter=lambda name: name in names, **options
                )
            torch.save({name: cache[name].half() for name in names}, folder / f"{first:06d}.pt")
        return sorted(folder.iterdir())

    def read(found: Any) -> dict[str, Any]:
        return {name: array[-1, -1, :8].tolist() for name, array in torch.load(found[-1]).items()}

    return works(model.cfg.n_layers, job.files[0], run, read)


def prepare(job: Job) -> Work | dict[str, Work]:
    """Every work."""
    import torch

    ids = torch.tensor(job.tokens)
    if job.work == "two_variants":
        return opened_twice(partial(_without_head, job.checkpoint, job.layer), torch.inference_mode()(lambda m: m(ids)))
    model = _open(job.checkpoint)
    if job.work.startswith("sweep:"):
        return _sweep(model, job, job.work.removeprefix("sweep:"))
    if job.work == "harvest":
        return _harvest(model, job)
    hook_z, last = f"blocks.{job.layer}.attn.hook_z", f"blocks.{model.cfg.n_layers - 1}.hook_resid_pre"

    def scale(z: Any, hook: Any) -> Any:
        return z * 0.5

    def zero(z: Any, hook: Any) -> Any:
        z[:, :, 0] = 0
        return z

    def with_hook(function: Any) -> Any:
        with torch.inference_mode():
            return model.run_with_hooks(ids, fwd_hooks=[(hook_z, function)])

    def cache(**options: Any) -> Any:
        with torch.inference_mode():
            return model.run_with_cache(ids, **options)

    def forward() -> Any:
        with torch.inference_mode():
            return model(ids)

    def generate() -> Any:
        options = {"do_sample": False, "stop_at_eos": False, "use_past_kv_cache": True, "verbose": False}
        with torch.inference_mode():
            return model.generate(ids, max_new_tokens=job.new_tokens, return_type="tokens", **options)

    filtered = partial(cache, names_filter=lambda name: name.endswith("hook_resid_pre"))
    return {
        "forward": Work(forward, logits_check),
        "full_cache": Work(cache, lambda r: logits_check(r[0]), lambda r: {"cached": len(r[1])}),
        "filtered_cache": Work(
            filtered, lambda r: logits_check(r[0]) | {"last resid_pre": r[1][last][0, -1, :8].tolist()}
        ),
        "one_hook": Work(partial(with_hook, scale), logits_check),
        "edit": Work(partial(with_hook, zero), logits_check),
        "generation": Work(generate, lambda tokens: {"tokens": tokens[0, -job.new_tokens :].tolist()}),
    }[job.work]
