"""Makes the golden files of the formats that this version writes: ``python tests/golden/make.py``, once for each release.

They are a hooked folder of a tiny random Gemma 3 of odd sizes (since format 4 adopted from a file that torch exported,
since format 5 with an SAE in it and its error term; up to format 2: GPT-2), an edits file and a saved sweep, in a folder
named after the three formats: ``1-1-1`` is format 1 of the manifest, of edits files and of sweep results.
``expected.safetensors`` holds what they must give, computed by transformers and torch hooks and not by graphlens. A folder
that is there is never made again: later versions open what earlier ones wrote. Needs the extras [cpu,export].
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    import transformers

    from graphlens import HookedTransformer, Sae

HERE = Path(__file__).parent
SIZES = {
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "hidden_size": 40,
    "intermediate_size": 56,
    "max_position_embeddings": 24,
    "vocab_size": 263,
    "sliding_window": 4,
}
LAYERS = SIZES["num_hidden_layers"]
TEXT = "When Ann and Bob met, Bob gave a book to Ann. The cat sat on the mat and the dog on the log."
PROMPT = "Bob gave a book to"
ANSWER, WRONG = 33, 34
Array = npt.NDArray[Any]


def formats() -> str:
    """The name of the folder of this version's formats."""
    from graphlens.analysis.result_files import FORMAT_VERSION as RESULT
    from graphlens.edits.files import FORMAT_VERSION as EDITS
    from graphlens.file.manifest import FORMAT_VERSION as MANIFEST

    return f"{MANIFEST}-{EDITS}-{RESULT}"


def main() -> int:
    """Makes them; 1 if they are there already, or if what graphlens computes is not what transformers does."""
    import graphlens
    from graphlens import interventions, surgery

    target = HERE / formats()
    if target.exists():
        print(f"{target}: is there already. Golden files are made once; a new format gets a folder of its own.")
        return 1
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".making-") as temporary:
        checkpoint, made = Path(temporary) / "golden-gemma3", Path(temporary) / target.name
        module = _save_checkpoint(checkpoint)
        foreign = Path(temporary) / "golden-gemma3.onnx"
        _export_elsewhere(module, foreign)
        graphlens.adopt(foreign, made / "model", config=checkpoint, tokenizer=checkpoint, announce=print)
        sae = _sae()
        with_sae = surgery.with_sae(
            surgery.load(made / "model"), sae, error_term=True
        )  # which leaves every number as it was
        surgery.save(with_sae, made / "model")
        model = graphlens.HookedTransformer.from_onnx(made / "model", "cpu")
        expected = _expected(module, model) | _features(module, sae)
        interventions.save(_edits(expected["steering"], expected["patch"]), made / "edits.json")
        _sweep(model, expected).save(made / "sweep.json")
        _write(made, expected)
        made.rename(target)  # all of it, or nothing
    print(f"Wrote {target}. Now: python -m pytest tests/golden")
    return 0


def _save_checkpoint(folder: Path) -> transformers.Gemma3ForCausalLM:
    """A random model with every weight far from its initial symmetry, and a byte-level tokenizer, saved."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    torch.manual_seed(11)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    numbers = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "query_pre_attn_scalar": 20}
    config = transformers.Gemma3TextConfig(**SIZES, **numbers, layer_types=layers, attn_implementation="eager")
    module = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    module.save_pretrained(folder)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", **dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return module


def _export_elsewhere(module: transformers.Gemma3ForCausalLM, file: Path) -> None:
    """Writes the model as torch's older exporter does."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    names, ids = ["input_ids", "attention_mask"], torch.randint(1, 9, (2, 7))
    axes = {name: {0: "batch", 1: "sequence"} for name in (*names, "logits")}
    torch.onnx.export(
        Logits().eval(),
        (ids, torch.ones_like(ids)),
        str(file),
        input_names=names,
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
        opset_version=17,
    )
    module.eval()


def _edits(steering: Array, patch: Array) -> list[Any]:
    """One edit of each kind; ``edited`` does the same to the module."""
    from graphlens import Ablate, Patch, Scale, Steer

    return [
        Scale("blocks.0.hook_mlp_out", 0.5),
        Ablate("blocks.1.attn.hook_z", heads=[1, 3]),
        Patch("blocks.1.hook_mlp_out", patch, positions=0),
        Steer("blocks.2.hook_resid_pre", steering, -1.5, positions=slice(1, None)),
    ]


@contextmanager
def _hooked(pairs: list[tuple[torch.nn.Module, Callable[..., Any], bool]]) -> Iterator[None]:
    """torch's hooks on modules, each before (True) or after it."""
    with ExitStack() as stack:
        for module, hook, before in pairs:
            handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def _edited(
    module: transformers.Gemma3ForCausalLM, tokens: torch.Tensor, steering: Array, patch: Array
) -> torch.Tensor:
    """The logits of the module with the edits of ``_edits``, by torch's own hooks."""
    import torch

    blocks, heads = module.model.layers, SIZES["num_attention_heads"]

    def without_heads(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = inputs[0].clone().unflatten(-1, (heads, -1))
        z[:, :, [1, 3]] = 0
        return (z.flatten(-2),)

    def patched(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 0] = torch.from_numpy(patch)
        return output

    def steered(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        residual = inputs[0].clone()
        residual[:, 1:] += torch.from_numpy(steering) * -1.5
        return (residual, *inputs[1:])

    with _hooked(
        [
            (blocks[0].post_feedforward_layernorm, lambda _, __, output: output * 0.5, False),
            (blocks[1].self_attn.o_proj, without_heads, True),
            (blocks[1].post_feedforward_layernorm, patched, False),
            (blocks[2], steered, True),
        ]
    ):
        logits: torch.Tensor = module(tokens).logits
    return logits


def _swept(module: transformers.Gemma3ForCausalLM, clean: torch.Tensor, corrupted: torch.Tensor) -> Array:
    """Each layer's residual at each position of the clean run put into the other's: the logit difference [layer, pos]."""

    kept = module(clean, output_hidden_states=True).hidden_states
    values = np.zeros((LAYERS, clean.shape[1]))
    for layer in range(LAYERS):
        for position in range(clean.shape[1]):

            def restored(_: Any, inputs: tuple[torch.Tensor, ...], layer: int = layer, at: int = position) -> Any:
                residual = inputs[0].clone()
                residual[:, at] = kept[layer][:, at]
                return (residual, *inputs[1:])

            with _hooked([(module.model.layers[layer], restored, True)]):
                values[layer, position] = _difference(module(corrupted).logits)
    return values


def _difference(logits: torch.Tensor) -> float:
    """The logit of the answer minus that of the wrong one, at the last position."""
    return float(logits[0, -1, ANSWER] - logits[0, -1, WRONG])


def _expected(module: transformers.Gemma3ForCausalLM, model: HookedTransformer) -> dict[str, Array]:
    """What the files must give, by transformers and torch; of ``model`` the tokenizer alone is asked, for a text's ids."""
    import torch

    rng = np.random.default_rng(7)
    tokens = torch.from_numpy(rng.integers(1, SIZES["vocab_size"], (2, 7)))
    steering, patch = (rng.standard_normal(SIZES["hidden_size"]).astype(np.float32) for _ in range(2))
    clean, corrupted = (torch.from_numpy(rng.integers(1, SIZES["vocab_size"], (1, 6))) for _ in range(2))
    with torch.no_grad():
        run = module(tokens, output_hidden_states=True, output_attentions=True)
        found = {
            "tokens": tokens,
            "logits": run.logits,
            "edited": _edited(module, tokens, steering, patch),
            "clean": clean,
            "corrupted": corrupted,
            "baselines": torch.tensor([_difference(module(ids).logits) for ids in (clean, corrupted)]),
        }
        for layer in range(LAYERS):
            found[f"cache/blocks.{layer}.hook_resid_pre"] = run.hidden_states[layer]
            found[f"cache/blocks.{layer}.attn.hook_pattern"] = run.attentions[layer]
        arrays = {name: value.numpy() for name, value in found.items()}
        arrays["swept"] = _swept(module, clean, corrupted)
    fast = model.runner.text.tokenizer.fast  # the tokenizers package's own
    ids = [0, *fast.encode(PROMPT, add_special_tokens=False).ids]
    return {**arrays, "steering": steering, "patch": patch, "prompt": np.asarray([ids])}


def _sae() -> Sae:
    """A random topk SAE of the residual after the second block, of more features than the model is wide."""
    from graphlens import Sae

    rng, width, features = np.random.default_rng(13), SIZES["hidden_size"], 67
    encoder, decoder = rng.standard_normal((width, features)) / 6, rng.standard_normal((features, width)) / 6
    biases = (rng.standard_normal(size) / 6 for size in (features, width))
    return Sae.from_arrays(encoder, next(biases), decoder, next(biases), "blocks.1.hook_resid_post", "topk", k=9)


def _features(module: transformers.Gemma3ForCausalLM, sae: Sae) -> dict[str, Array]:
    """The features of the tokens of ``_expected``, by torch."""
    import torch

    tokens = torch.from_numpy(np.random.default_rng(7).integers(1, SIZES["vocab_size"], (2, 7)))
    w = {name: torch.from_numpy(np.array(weight)) for name, weight in sae.weights.items()}
    with torch.no_grad():
        residual = module(tokens, output_hidden_states=True).hidden_states[2]
        largest, places = ((residual - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).topk(9)
        found = torch.zeros(2, 7, 67).scatter(-1, places, largest.relu())
    return {"features/blocks.1.hook_resid_post.hook_sae_acts_post": found.numpy()}


def _sweep(model: HookedTransformer, expected: dict[str, Array]) -> Any:
    """The sweep that ``_swept`` does by torch, by graphlens."""
    from graphlens.experiments.act_patch import act_patch_sites
    from graphlens.metrics import LogitDiff
    from graphlens.patching import sweep

    clean, corrupted = expected["clean"], expected["corrupted"]
    _, cache = model.run_with_cache(clean)
    sites = act_patch_sites(model, corrupted, "resid_pre")
    return sweep(model, corrupted, sites, cache, LogitDiff(ANSWER, WRONG), verbose=False)


def _write(target: Path, expected: dict[str, Array]) -> None:
    """Writes what was expected, and what it was made with."""
    import onnxruntime
    import torch
    import transformers
    from safetensors.numpy import save_file

    import graphlens
    from graphlens.file.version import __version__

    save_file({name: np.ascontiguousarray(array) for name, array in expected.items()}, target / "expected.safetensors")
    made = {
        "graphlens": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "prompt": PROMPT,
        "answer": ANSWER,
        "wrong": WRONG,
    }
    (target / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    assert graphlens.HookedTransformer.from_onnx(target / "model", "cpu").cfg.n_layers == LAYERS


if __name__ == "__main__":
    sys.exit(main())
