"""graphlens, its NumPy face on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.bench.workers.protocol import Job, Work, logits_check, opened_twice, sae_check


def _sweep(model: Any, job: Job, kind: str) -> Work:
    import numpy as np

    from graphlens import patching
    from graphlens.metrics import LogitDiff
    from tools.bench.sweeps import KINDS

    hook = KINDS[kind].hook
    _, clean_cache = model.run_with_cache(np.array(job.tokens), names_filter=lambda name: name.endswith(hook))
    function = getattr(patching, f"get_act_patch_{kind}")
    work = partial(function, model, np.array(job.corrupted), clean_cache, LogitDiff(*job.answers))
    return Work(work, lambda values: {"values": np.asarray(values).tolist()})


def _harvest(model: Any, job: Job) -> dict[str, Work]:
    from pathlib import Path

    import numpy as np

    from graphlens import harvest
    from tools.bench.harvest_loop import works

    ids = np.array(job.tokens)

    def run(names: list[str], stop: int | None, batch: int, folder: Path) -> Any:
        length = ids.shape[1]
        return harvest(
            model, ids, names, folder, dtype="float16", batch_tokens=batch * length, context=length, verbose=False
        )

    def read(found: Any) -> dict[str, Any]:
        return {name: found[name][-1][:8].tolist() for name in found.names}

    return works(model.cfg.n_layers, job.files[0], run, read)


def _saes(model: Any, job: Job) -> dict[str, Work]:
    import numpy as np

    from graphlens import Sae

    ids, saes = np.array(job.tokens), [Sae.from_folder(folder) for folder in job.files]

    def read(error_term: bool) -> Any:
        return model.run_with_cache_with_saes(
            ids, saes=saes, use_error_term=error_term, names_filter=lambda name: name.endswith("hook_sae_acts_post")
        )

    return {
        "with error terms": Work(partial(read, True), sae_check),
        "without": Work(partial(read, False), sae_check),
    }


def prepare(job: Job) -> Work | dict[str, Work]:
    """Every work."""
    import numpy as np

    from graphlens import Ablate, HookedTransformer

    ids = np.array(job.tokens)
    if job.work == "two_variants":

        def open_one(head: int) -> Any:
            if job.files:
                return partial(HookedTransformer.from_onnx(job.files[head], "cpu"), ids)
            edit = Ablate(f"blocks.{job.layer}.attn.hook_z", heads=head)
            return partial(HookedTransformer.from_onnx(job.hooked, "cpu").run_with_interventions, ids, edit)

        return opened_twice(open_one, lambda variant: variant())
    model = HookedTransformer.from_onnx(job.hooked, "cpu")
    if job.work.startswith("sweep:"):
        return _sweep(model, job, job.work.removeprefix("sweep:"))
    if job.work == "harvest":
        return _harvest(model, job)
    if job.work == "saes":
        return _saes(model, job)
    hook_z, last = f"blocks.{job.layer}.attn.hook_z", f"blocks.{model.cfg.n_layers - 1}.hook_resid_pre"
    ablation = Ablate(hook_z, heads=0)

    def scale(z: Any, hook: Any) -> Any:
        return z * 0.5

    filtered = partial(model.run_with_cache, ids, names_filter=lambda name: name.endswith("hook_resid_pre"))
    generate = partial(
        model.generate, ids, job.new_tokens, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    return {
        "forward": Work(partial(model, ids), logits_check),
        "full_cache": Work(
            partial(model.run_with_cache, ids), lambda r: logits_check(r[0]), lambda r: {"cached": len(r[1])}
        ),
        "filtered_cache": Work(
            filtered, lambda r: logits_check(r[0]) | {"last resid_pre": r[1][last][0, -1, :8].tolist()}
        ),
        "one_hook": Work(partial(model.run_with_hooks, ids, fwd_hooks=[(hook_z, scale)]), logits_check),
        "edit": Work(partial(model.run_with_interventions, ids, ablation), logits_check),
        "generation": Work(generate, lambda tokens: {"tokens": tokens[0, -job.new_tokens :].tolist()}),
    }[job.work]
