"""Run by an interpreter that has sae-lens: SAELens's own scores of SAEs, for tests/saes/scores_check.py.

``sae_scores_oracle.py FOLDER`` reads what ``sae_splice_oracle.py`` reads, with ``tokens.npy`` [batches, b, p], and writes
``scores.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.training.activation_scaler import ActivationScaler
from sae_splice_oracle import model_of


class Store:
    """Hands out the batches one after the other, as SAELens's ActivationsStore does."""

    def __init__(self, batches: torch.Tensor) -> None:
        self._left: Iterator[torch.Tensor] = iter(batches)

    def get_batch_tokens(self, size: int) -> torch.Tensor:
        found = next(self._left)
        assert len(found) == size
        return found


def scores(model: Any, sae: Any, batches: torch.Tensor, ignored: list[int]) -> dict[str, Any]:
    given = {"n_batches": len(batches), "eval_batch_size_prompts": batches.shape[1], "ignore_tokens": ignored or None}
    with torch.no_grad():
        lost = get_downstream_reconstruction_metrics(
            sae, model, Store(batches), ActivationScaler(), compute_kl=True, compute_ce_loss=True, **given
        )
        if "hook_z" in sae.cfg.metadata.hook_name:
            sae.turn_off_forward_pass_hook_z_reshaping()
        rest, by_feature = get_sparsity_and_variance_metrics(
            sae, model, Store(batches), ActivationScaler(), compute_l2_norms=True, compute_sparsity_metrics=True,
            compute_variance_metrics=True, compute_featurewise_density_statistics=True, model_kwargs={}, **given,
        )  # fmt: skip
    return {**lost, **rest, "density": by_feature["feature_density"]}


def main() -> None:
    root = Path(sys.argv[1])
    model, batches = model_of(root), torch.from_numpy(np.load(root / "tokens.npy"))
    found = {}
    for case in json.loads((root / "cases.json").read_text()):
        sae = SAE.load_from_disk(root / case["folder"])
        if "hook_z" in sae.cfg.metadata.hook_name:
            sae.turn_off_forward_pass_hook_z_reshaping()
        found[case["name"]] = scores(model, sae, batches, case["excluded"])
    (root / "scores.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
