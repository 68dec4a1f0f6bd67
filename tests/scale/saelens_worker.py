"""Run by an interpreter that has SAELens: its own loader opens what a harvest saved, and its rows go to stdout as JSON.

Called with the folder, the hook point, the tokens of a row and the width of an activation.
"""

from __future__ import annotations

import json
import sys


def main(folder: str, hook: str, context: int, width: int) -> None:
    import numpy as np
    import torch
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore(
        model=torch.nn.Module(),  # nothing of it is asked: the activations are there
        dataset=None,
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=context,
        d_in=width,
        n_batches_in_buffer=2,
        total_training_tokens=context,
        store_batch_size_prompts=2,
        train_batch_size_tokens=context,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=folder,
    )
    values, tokens = store.get_raw_llm_batch()
    array = np.asarray(values, np.float32).reshape(-1, width)
    print(json.dumps({"values": array.tolist(), "tokens": np.asarray(tokens).reshape(-1).tolist()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
