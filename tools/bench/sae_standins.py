"""SAEs with random weights for benchmarks, kept in the folder where models are: as wide as they are published for GPT-2 small."""

from __future__ import annotations

from pathlib import Path

from tools.bench.standin import Standin

FEATURES = 24_576
SEED = 11


def features_of(model: Standin) -> int:
    """How many features: 32 for each number of the residual stream."""
    return FEATURES * model.d_model // 768


def sae_folders(model: Standin, count: int) -> list[Path]:
    """Folders in SAELens's layout of SAEs at the residual streams after the first ``count`` blocks; made where they are not."""
    import numpy as np

    from graphlens import Sae

    width, features = model.d_model, features_of(model)
    folders = []
    for layer in range(count):
        folder = model.workdir / f"saes-{features}" / f"blocks.{layer}.hook_resid_post"
        folders.append(folder)
        if (folder / "cfg.json").is_file():
            continue
        rng = np.random.default_rng((SEED, layer))
        decoder = rng.standard_normal((features, width), np.float32)
        decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
        sae = Sae.from_arrays(
            np.ascontiguousarray(decoder.T),
            np.full(features, -2.5, np.float32),  # so that few are active
            decoder,
            np.zeros(width, np.float32),
            f"blocks.{layer}.hook_resid_post",
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        sae.save(folder)
    return folders
