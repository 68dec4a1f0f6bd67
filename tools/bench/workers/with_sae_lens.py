"""SAELens's HookedSAETransformer, on TransformerLens 3.9."""

from __future__ import annotations

import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from tools.bench.workers.protocol import Job, Work, sae_check


def prepare(job: Job) -> dict[str, Work]:
    """A cache of every SAE's features, with and without the error term."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "parity"))
    import torch
    from lens_oracle import oracle
    from sae_lens import SAE, HookedSAETransformer

    plain = oracle(job.checkpoint)
    model = HookedSAETransformer(plain.cfg)
    model.load_state_dict(plain.state_dict(), strict=False)
    model.eval().requires_grad_(False)
    saes = [SAE.load_from_disk(folder) for folder in job.files]
    ids = torch.tensor(job.tokens)

    def read(error_term: bool) -> Any:
        with torch.inference_mode():
            return model.run_with_cache_with_saes(
                ids, saes=saes, use_error_term=error_term, names_filter=lambda name: name.endswith("hook_sae_acts_post")
            )

    return {
        "with error terms": Work(partial(read, True), sae_check),
        "without": Work(partial(read, False), sae_check),
    }
