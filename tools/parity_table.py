"""Write docs/parity.md: every hook point beside TransformerLens 3.9's, with the largest difference found.

    python tools/parity_table.py

Runs the parity matrix that the tests assert (tests/parity/matrix.py) and writes what it measured.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "parity"))


def measure(work: Path) -> dict[str, tuple[str, float, float]]:
    """Hook name with the layer as ``i`` -> (shape, largest difference read, largest after an edit)."""
    from matrix import FLAG_SETS, MODELS, pair, prompt

    found: dict[str, tuple[str, float, float]] = {}
    for model in MODELS:
        for processed in (False, True):
            both = pair(model, processed, work)
            for flags in FLAG_SETS.values():
                both.set_flags(flags)
                shapes = both.ours.hook_points()
                axes = both.ours.runner.engine.hooks(both.ours.runner.plan())
                for difference in both.differences(prompt(both, 2, 9)):
                    name = re.sub(r"blocks\.\d+", "blocks.i", difference.hook)
                    shape = (
                        f"[{', '.join(axes[difference.hook].axes)}]" if difference.hook in shapes else "[b, p, d_vocab]"
                    )
                    known = found.get(name, (shape, 0.0, 0.0))
                    found[name] = (known[0], max(known[1], difference.read), max(known[2], difference.edited))
            print(f"{model}, {'processed' if processed else 'unprocessed'}: done", file=sys.stderr)
    return found


def render(found: dict[str, tuple[str, float, float]]) -> str:
    """The page."""
    from matrix import FLAG_SETS, MODELS, TOLERANCE

    from graphlens.file.bridge import BRIDGE, BRIDGE_BLOCK
    from graphlens.file.names import FLAGGED

    four: dict[str, list[str]] = {}
    for name, ours in [*BRIDGE.items(), *((f"blocks.i.{a}", f"blocks.i.{b}") for a, b in BRIDGE_BLOCK.items())]:
        four.setdefault(ours, []).append(f"`{name}`")
    rows = []
    for name, (shape, read, edited) in found.items():
        flag = FLAGGED.get(name.removeprefix("blocks.i."), "")
        notes = ", ".join(filter(None, [flag and f"`{flag}`", f"4.x: {', '.join(four[name])}" if name in four else ""]))
        cells = (f"`{name}`", f"`{name}`", shape, f"{read:.1e}", "" if name == "logits" else f"{edited:.1e}", notes)
        rows.append("| " + " | ".join(cells) + " |")
    table = "\n".join(rows)
    worst = max(max(read, edited) for _, read, edited in found.values())
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("transformer-lens", "torch", "transformers", "onnxruntime")
    )
    return f"""# Parity with TransformerLens

Written by `tools/parity_table.py` from the matrix that `tests/parity/test_matrix.py` asserts. Every hook point of
{len(MODELS)} models ({"; ".join(MODELS)}), with weights processed (TransformerLens's defaults) and unprocessed, and with
{len(FLAG_SETS)} sets of flags, on 2 prompts of 9 tokens, in float32.

*Read*: the cached activation. *Edited*: the logits after a Python hook there has put another value at every element.
Both as a share of max(1, max|reference|), the largest over all models and layers; the tests allow {TOLERANCE:.0e}, the
largest here is {worst:.1e}. Cache order is firing order, and equal.

Measured with {versions}, on {platform.machine()}, {os.cpu_count()} cores.

![The largest differences from TransformerLens 3.9, hook points read and edited](pictures/parity.svg)

| TransformerLens 3.9 | graphlens | shape | read | edited | flag, other name |
|---|---|---|---|---|---|
{table}

## Where graphlens departs on purpose

Hooks and caches:

- A hook on a point whose flag is off raises and names the flag; TransformerLens lets it never fire.
- A `names_filter` that matches nothing raises with the nearest names; TransformerLens gives an empty cache.
- `pos_slice` slices the position axis of every hook point; TransformerLens slices the head axis of some.
- Without split inputs `ln1` runs once and its hook points fire once; TransformerLens runs it three times on the same
  values. With them it fires for queries, keys and values apart, in both.
- A callable filter is asked for these names, never for TransformerLens 4's.
- `with model.hooks` concerns the thread that entered it. `reset_hooks` inside removes the block's hooks, and the end of
  the block puts back those of the blocks around it, which are gone in TransformerLens. Hooks kept by
  `reset_hooks_end=False` stay until they are reset; in TransformerLens the next `run_with_hooks` removes them.
- `run_with_cache(remove_batch_dim=True)` of several prompts keeps the first one's activations, as there, with a warning.
- A KV cache belongs to the file that filled it: another one of the same shape is refused. TransformerLens compares the
  shapes alone.

Analysis:

- `refactor_factored_attn_matrices` takes singular vectors from NumPy's SVD, TransformerLens from torch's: a pair of them
  (in W_Q and W_K, in W_V and W_O) may have the other sign in both. Their products, and all that a model computes, are equal.
- `incl_remainder` at layer 0 is `resid_pre` of layer 0, since nothing is written before it; there it is the last layer's
  `resid_post`.
- `apply_ln_to_stack` and `logit_attrs` take any leading axes, as there, and broadcast as there, with three exceptions. They
  refuse what would divide by the scale of another position: a run of one position (`pos_slice=[3]`) for a stack of several,
  and vectors [k, d_model] in a run of k prompts of k positions without a `pos_slice`. `batch_slice` takes the axis of prompts
  wherever the stack has it (there always its second axis). Tokens [batch] with a stack of all positions are one for each
  prompt (there an error, or one for each position where the sizes are equal, which is refused here).
- `detect_head` with a pattern of one's own and several prompts is their mean; there it is the first prompt's score. A prompt
  of n_ctx tokens is taken.
- `FactoredMatrix` of arrays computes in float32 at least. Of tensors it computes in their dtype, in the wider one of two, and
  decomposes half precision in float32.
- `KeyValueCache` is one class for both faces; what its entries show are tensors on the torch face. Entries that are read or
  set are taken over by the next run; those of another model's shape, and a mask that counts other positions, are refused.
  Keys of a model with rotary positions are shown as they are computed with, after the rotation (there before it): put
  into a cache by hand they serve the positions at which they were computed, which a warning says.

Exceptions: each is a `GraphlensError`, and of the built-in kind that its meaning has. Where TransformerLens asserts, graphlens
raises one of these instead, so that `except AssertionError` catches none.

| graphlens | is also | for |
|---|---|---|
| `UnknownHookPoint` | KeyError | a name that is no hook point, or not in a cache |
| `InputError` | ValueError | tokens, options, values that cannot be taken |
| `InputTypeError` | ValueError, TypeError | an argument of another kind |
| `InputIndexError` | ValueError, IndexError | an index outside its axis |
| `InputKeyError` | ValueError, KeyError | a weight that the file does not have |
| `StateDictError` | ValueError, RuntimeError | a state dict that does not fit the model |
| `InputAttributeError` | ValueError, AttributeError | an assignment to a part of a model |
| `InputShapeError` | ValueError, RuntimeError | shapes that do not go together (ValueError in NumPy, RuntimeError in torch) |
| `StateDictError` | ValueError, RuntimeError | a state dict that does not fit the model (RuntimeError in torch) |
| `HookResultError` | ValueError | what a hook returned |
| `ModelFileError` | ValueError | a damaged or strange file |
| `ExportError` | ValueError | a checkpoint that cannot be exported |
| `VerificationError` | ValueError, RuntimeError | an export that does not behave as its checkpoint |
| `RunError` | RuntimeError | a run that ONNX Runtime could not finish |
| `RuntimeUnavailable` | ImportError | a package or a device that is not there |

Text and padding:

- The prompt's padding is known exactly where text was padded; token ids alone fall back on TransformerLens's rule.
- Text longer than n_ctx is cut with a warning in forward (silently in TransformerLens), and is an error in `generate`.
- `to_tokens(text, prepend_bos=False)` of a text beyond n_ctx has n_ctx tokens (there one less, where the tokenizer puts BOS
  first). Special tokens that a tokenizer puts after a text are not there.
- `input_to_embed` leaves a KV cache as it is; there it extends its mask.
- `generate("")` continues BOS; where BOS and PAD are one token, TransformerLens takes it for padding and masks it.
- A run of no tokens is an error. `to_str_tokens("", prepend_bos=False)` is `[]`; there it is `[""]`.

Generating:

- `generate(repetition_penalty=...)` penalises; in TransformerLens 3.9 it is ignored with a warning. With embeddings
  a frequency or repetition penalty is refused, and ignored there.
- Embeddings are continued alike with a KV cache and without. In TransformerLens, with one, every token after the first gets
  the position embedding of a later place.
- With top_k and top_p both given, `generate` and `sample_logits` apply them one after the other;
  TransformerLens leaves out top_p.
- `generate` past n_ctx raises before it starts.
- `generate` of token ids whose last one is padding raises, where TransformerLens continues from the padding; in a batch
  of one, end tokens at the end of the ids are part of it.
- `generate_stream` yields tokens, as TransformerLens does; `return_type="str"` gives text, and is ignored there.
  TransformerLens's stream also takes an end token that it has generated for padding, which its `generate` does not.
- A loss with a KV cache works on every call; in TransformerLens on the first one only.

The configuration and the constructors:

- `cfg.n_key_value_heads` of a file is a number (there None for plain attention); `cfg.tokenizer_prepends_bos` is what the given
  tokenizer does by itself (TransformerLens replaces the tokenizer by one that prepends); `cfg.attn_scale` is sqrt(d_head)
  (there -1 for a model that does not scale its scores).
- A field of `cfg` that the graph was made by cannot be set, where TransformerLens ignores it or breaks: flags and text
  defaults can, and are then set on the model; see [configs.md](configs.md). A model has a config of its own, a copy of the
  one that it was built from. `cfg.device` of the NumPy face is where the session runs, and on the torch face where tensors
  come out, the CPU.
- With `init_weights=False` weight matrices are zeros, uninitialised memory there.
- What follows `center_unembed` in the constructors is passed by name.
- An `hf_model` in float64 is refused; models are exported from float32, whatever precision they then compute in, and
  processed in it. `accumulated_bias` of a float64 model is float64.
- `all_composition_scores` and weight stacks are computed when they are asked for, as copies.
- Weight processing never changes predictions. In models from a config TransformerLens's does where `final_rms` is set or
  logits have a soft cap (it centres W_U), where position embeddings are added late (`shortformer`: it centres W_pos, and
  `load_and_process_state_dict` folds the norms), and where a gated MLP follows LayerNorm (it loses the norm's bias at the
  gate): here these steps leave that out.
- A `shortformer` model adds its position embeddings to queries and keys with `start_at_layer` too, so that a run continues
  as the whole one; TransformerLens only where `shortformer_pos_embed` is passed, which here must be the model's own.
  `decompose_resid` leaves them out, since they are not in the residual stream.
- Where `n_key_value_heads` equals `n_heads`, `state_dict()` has `W_K` and `W_V`, there `_W_K` and `_W_V`;
  `load_state_dict` takes both.
"""


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRAPHLENS_CACHE"] = f"{folder}/cache"
        page = render(measure(Path(folder)))
    path = ROOT / "docs" / "parity.md"
    path.write_text(page, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
