"""Run by an interpreter that has sae-lens: what HookedSAETransformer computes with SAEs, for tests/saes/splicing_check.py.

``sae_splice_oracle.py FOLDER`` reads ``config.json``, ``weights.npz``, ``tokens.npy``, ``cases.json``, and writes a ``.npz``
beside each case's SAE.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig

warnings.simplefilter("ignore")
HOOKS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)


def model_of(root: Path) -> HookedSAETransformer:
    cfg = HookedTransformerConfig(**json.loads((root / "config.json").read_text()))
    model = HookedSAETransformer(cfg)
    with np.load(root / "weights.npz") as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if "mask" not in name and "IGNORE" not in name], missing
    return model.eval()


def run(model: HookedSAETransformer, case: dict[str, Any], folder: Path, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    sae = SAE.load_from_disk(folder)
    at, excluded = case["writes"], case["excluded"] or False
    post = f"{at}.hook_sae_acts_post"
    asked = {"use_error_term": case["error_term"], "exclude_special_tokens": excluded}
    with torch.no_grad():
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae], **asked)
    found = {"logits": logits, **{name: cache[f"{at}.{name}"] for name in HOOKS if f"{at}.{name}" in cache}}

    def without(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[..., case["ablated"]] = 0
        return value

    def scaled(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value * 1.5

    kept: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value * 1  # the SAE's input is the hook point's very tensor, which may have readers besides
        value.retain_grad()
        kept[hook.name] = value
        return value

    with model.saes([sae], **asked):
        found["edited"] = model.run_with_hooks(tokens, fwd_hooks=[(post, without), (f"{at}.hook_sae_recons", scaled)])
        names = [f"{at}.{name}" for name in HOOKS if name != "hook_sae_error"]
        end = model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names])
        (end[:, -1, 3] - end[:, -1, 7]).mean().backward()
    model.reset_saes()
    found |= {f"grad.{name.rpartition('.')[2]}": value.grad for name, value in kept.items() if value.grad is not None}
    return {name: value.detach().numpy() for name, value in found.items()}


def main() -> None:
    root = Path(sys.argv[1])
    model, tokens = model_of(root), torch.from_numpy(np.load(root / "tokens.npy"))
    np.savez(root / "plain.npz", logits=model(tokens).detach().numpy())
    for case in json.loads((root / "cases.json").read_text()):
        np.savez(root / case["folder"] / f"{case['name']}.npz", **run(model, case, root / case["folder"], tokens))


if __name__ == "__main__":
    main()
