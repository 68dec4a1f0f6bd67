"""Run by the interpreter that has TransformerLens 4: reads models from stdin as JSON, and writes a line of JSON for each."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge as Theirs

import graphlens
from graphlens.transformer_lens4 import TransformerBridge, boot
from tests.families.comparing import edit_of, prompt, relative
from tests.transformerlens4.page import ALLOWED

Worst = tuple[float, str]
# A tensor that a hook returns there changes what the norm reads and not the residual stream, in TransformerLens 4 alone;
# one that is changed in place changes both, as everywhere here.
IN_PLACE = ("ln2.hook_in", "mlp.hook_in", "hook_resid_mid")
FLAGS_TRIED = ("gpt2", "llama")
# Points of their own there, with the values of another that our name means.
TWICE = ("attn.o.hook_out", "mlp.out.hook_out", "ln_final.hook_out")
# Where TransformerLens 4 means something else, or what it has is no reference: model -> end of a name -> why.
_PATTERN = {
    "attn.hook_attn_scores": "the pattern, there",
    "attn.hook_pattern": "what a hook returns changes nothing there",
}
_ONE_NORM = dict.fromkeys(
    ("ln1.hook_scale", "ln1.hook_normalized", "ln2.hook_scale", "ln2.hook_normalized"),
    "one norm there, `ln1`, that attention and MLP both read; here each has its own",
)
_RAISES = "a change raises AttributeError there, as the norm has no weight"
KNOWN: dict[str, dict[str, str]] = {
    "gpt-neo": _PATTERN,
    "gptj": _PATTERN | _ONE_NORM,
    "opt": _PATTERN,
    "bloom": {"attn.hook_attn_scores": "another number is added for each query there, which the pattern does not show"},
    "falcon-7b": _ONE_NORM,
    "phi": _ONE_NORM,
    "stablelm": {
        "ln2.hook_normalized": "in compatibility mode the gate's weights are not centred there; here they are"
    },
    "stablelm-parallel": _ONE_NORM,
    "mixtral": {
        "mlp.hook_expert_weights": "those of the chosen experts alone, which add up to 1, there",
        "mlp.hook_expert_indices": "other experts get the weights of those that were chosen first, there",
    },
    "olmo": dict.fromkeys(("ln1.hook_scale", "ln1.hook_normalized", "ln2.hook_scale", "ln2.hook_normalized"), _RAISES)
    | dict.fromkeys(("ln_final.hook_scale", "ln_final.hook_normalized"), _RAISES),
}


def masked(value: torch.Tensor) -> np.ndarray:
    """An activation with what is masked at minus infinity."""
    lowest = torch.finfo(value.dtype).min if value.is_floating_point() else 0
    return (
        value.detach().masked_fill(value <= lowest, -torch.inf).numpy() if value.is_floating_point() else value.numpy()
    )


def differs(found: torch.Tensor, expected: torch.Tensor, what: str, as_masked: bool = True) -> Worst:
    """The largest difference, as a share of max(1, max|expected|)."""
    if as_masked or not found.is_floating_point():
        return relative(masked(found), masked(expected), what), what
    same = bool(torch.equal(torch.isneginf(found), torch.isneginf(expected)))
    lowest = torch.finfo(found.dtype).min
    if not same or not torch.equal(found == lowest, expected == lowest):
        return float("inf"), f"{what}: another mask value"
    return relative(masked(found), masked(expected), what), what


def changing(name: str, in_place: bool) -> Callable[..., torch.Tensor]:
    """A hook that puts another value at every element that is not masked."""

    def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        if not activation.is_floating_point():
            return torch.from_numpy(edit_of(name, activation.numpy()))
        lowest = torch.finfo(activation.dtype).min
        kept = torch.where(activation <= lowest, torch.zeros_like(activation), activation).detach()
        new = torch.from_numpy(edit_of(name, kept.numpy())).to(activation.dtype)
        new = torch.where(activation <= lowest, activation, new)
        if not in_place:
            return new
        activation.copy_(new)
        return activation

    return hook


def tail(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def told(kinds: dict[str, list[Worst]], known: Mapping[str, str]) -> tuple[dict[str, Worst], list[str]]:
    """The largest difference of each kind, without those that TransformerLens 4 is known for; and the names of these.

    Args:
        kinds: Differences, each with the hook point's name last in its description.
        known: The end of a name -> why it differs.
    """
    worst, seen = {}, []
    for kind, some in kinds.items():
        kept = []
        for share, what in some:
            end = tail(what.split(": ")[0].rpartition(" ")[2])
            if end in known and not share <= ALLOWED:
                seen.append(end)
            else:
                kept.append((share, what))
        worst[kind] = max(kept)
    return worst, seen


def faces(
    ours: Any, theirs: Any, tokens: torch.Tensor, prefix: str
) -> tuple[dict[str, list[Worst]], list[str], list[str]]:
    """Both under the same names: logits, activations, and logits after a change at every hook point."""
    worst: dict[str, list[Worst]] = {"logits": [], "read": [], "edited": []}
    logits, cache = ours.run_with_cache(tokens)
    expected, their_cache = theirs.run_with_cache(tokens)
    worst["logits"].append(differs(logits, expected, "logits"))
    known = theirs.hook_dict
    strange = [name for name in ours.hook_points() if name not in known]
    notes, left_out = [], set(strange)
    for name, value in cache.items():
        if name not in known:
            continue
        if ours.hook_dict[name].name != known[name].name and tail(name) not in TWICE:
            here, there = tail(ours.hook_dict[name].name), tail(known[name].name)
            notes.append(f"`{tail(name)}`: called `{here}` here, `{there}` there")
        if name not in their_cache:
            notes.append(f"`{tail(name)}`: never fires there")
            left_out.add(name)
            continue
        if tuple(value.shape) != tuple(their_cache[name].shape):
            left_out.add(name)
            notes.append(f"`{tail(name)}`: {list(value.shape)} here, {list(their_cache[name].shape)} there")
            continue
        worst["read"].append(differs(value, their_cache[name], name, as_masked=False))
    for name in ours.hook_points():
        if name in left_out:
            continue
        hook = changing(name, tail(name) in IN_PLACE)
        found = ours.run_with_hooks(tokens, fwd_hooks=[(name, hook)])
        try:
            wanted = theirs.run_with_hooks(tokens, fwd_hooks=[(name, hook)])
        except AttributeError as error:
            worst["edited"].append((float("inf"), f"an edit at {name}: {error}"))
            continue
        worst["edited"].append(differs(found, wanted, f"an edit at {name}"))
    return {prefix + what: some for what, some in worst.items()}, strange, list(dict.fromkeys(notes))


def specs(shape: torch.Size, name: str) -> Iterator[tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]]:
    """Interventions, and the same as functions of the activation."""
    rng = np.random.default_rng(len(name))
    width = torch.from_numpy(rng.standard_normal(shape[-1]).astype(np.float32))
    each = torch.from_numpy(rng.standard_normal((2, *shape[2:])).astype(np.float32))

    def at(change: Callable[[torch.Tensor], torch.Tensor], *positions: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(activation: torch.Tensor) -> torch.Tensor:
            new = activation.clone()
            index = list(positions) or slice(None)
            new[:, index] = change(activation[:, index])
            return new

        return run

    yield {"op": "suppress"}, at(lambda x: x * 0)
    yield {"op": "scale", "factor": 1.5, "pos": 3}, at(lambda x: x * 1.5, 3)
    yield {"op": "add", "value": width.tolist()}, at(lambda x: x + width)
    yield {"op": "add", "value": each, "pos": [1, -2]}, at(lambda x: x + each, 1, -2)
    yield {"op": "set", "value": 0.25, "pos": [2]}, at(lambda x: x * 0 + 0.25, 2)
    yield {"op": "set", "value": each, "pos": [0, 4]}, at(lambda x: x * 0 + each, 0, 4)


def remote(bridge: Any, theirs: Any, tokens: torch.Tensor) -> dict[str, list[Worst]]:
    """The hooked file behind TransformerLens's RemoteBridge, beside TransformerLens's own model."""
    worst: dict[str, list[Worst]] = {"remote logits": [], "remote read": [], "remote edited": []}
    expected, their_cache = theirs.run_with_cache(tokens)
    worst["remote logits"].append(differs(bridge.forward(tokens), expected, "logits"))
    loss = torch.abs(bridge.forward(tokens, return_type="loss") - theirs(tokens, return_type="loss"))
    worst["remote logits"].append((float(loss), "the loss"))
    logits, cache = bridge.run_with_cache(tokens)
    worst["remote logits"].append(differs(logits, expected, "logits beside captures"))
    for name, value in cache.items():
        if name in their_cache and value.shape == their_cache[name].shape:
            worst["remote read"].append(differs(value, their_cache[name], name, as_masked=False))
    for name in sorted(name for name, point in bridge.hook_dict.items() if point.name == name):
        value = cache[name]
        if name.startswith("blocks.") and not name.startswith("blocks.1."):  # the same in every block
            continue
        if name not in their_cache or value.shape != their_cache[name].shape or tail(name) in IN_PLACE:
            continue
        if value.ndim < 3 or not value.is_floating_point() or tail(name).endswith(("scores", "pattern", "scale")):
            continue
        for spec, function in specs(value.shape, name):
            found = bridge.forward(tokens, intervene={name: spec})
            try:
                wanted = theirs.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook, f=function: f(x))])
            except AttributeError as error:
                worst["remote edited"].append((float("inf"), f"{spec['op']} at {name}: {error}"))
                continue
            worst["remote edited"].append(differs(found, wanted, f"{spec['op']} at {name}"))
    return worst


def flagged(hooked: str, theirs: Any, tokens: torch.Tensor, tokenizer: Any) -> list[Worst]:
    """What hook points that a flag adds hold behind a RemoteBridge."""
    names = [
        "blocks.1.attn.hook_result",
        "blocks.1.hook_mlp_in",
        "blocks.1.attn.hook_q_input",
        "blocks.1.attn.hook_k_input",
    ]
    flags = ("use_attn_result", "use_hook_mlp_in", "use_split_qkv_input")
    _, cache = boot(hooked, tokenizer, "cpu", flags).run_with_cache(tokens, names_filter=names)
    for flag in flags:
        getattr(theirs, f"set_{flag}")(True)
    _, expected = theirs.run_with_cache(tokens, names_filter=names)
    for flag in flags:
        getattr(theirs, f"set_{flag}")(False)
    return [differs(cache[name], expected[name], name) for name in names]


def measure(name: str, checkpoint: str, hooked: str, tokenizer: Any) -> dict[str, Any]:
    """Everything about one model."""
    theirs = Theirs.boot_transformers(checkpoint, device="cpu", tokenizer=tokenizer)
    ours = TransformerBridge.boot_transformers(hooked, device="cpu")
    tokens = torch.from_numpy(prompt(ours.cfg.d_vocab, 2, 11))
    kinds, strange, notes = faces(ours, theirs, tokens, "")
    kinds |= remote(boot(hooked, tokenizer=tokenizer, providers="cpu"), theirs, tokens)
    if name in FLAGS_TRIED:
        kinds["remote read"] += flagged(hooked, theirs, tokens, tokenizer)
    theirs.enable_compatibility_mode(disable_warnings=True)
    ours.enable_compatibility_mode()
    kinds |= faces(ours, theirs, tokens, "processed ")[0]
    known = KNOWN.get(name, {})
    worst, seen = told(kinds, known)
    strange = list(dict.fromkeys(map(tail, strange)))
    for why in dict.fromkeys(known.values()):
        ends = [end for end in known if known[end] == why]
        notes.append(f"{', '.join(f'`{end}`' for end in ends)}: {why}")
    stale = known.keys() - {*seen, *strange}
    return {
        "name": name,
        "names": len(ours.hook_dict),
        "worst": worst,
        "strange": [end for end in strange if end not in known],
        "notes": notes,
        "failed": f"what is known differs no more: {', '.join(stale)}" if stale else None,
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    packages = ("transformer-lens", "transformers", "torch", "onnxruntime")
    print(json.dumps({"versions": ", ".join(f"{package} {version(package)}" for package in packages)}), flush=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(graphlens.embedded_model())
    for name, checkpoint, hooked in json.load(sys.stdin):
        try:
            told = measure(name, checkpoint, hooked, tokenizer)
        except Exception as error:  # noqa: BLE001 (each model has its line)
            import traceback

            traceback.print_exc()
            told = {"name": name, "failed": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
