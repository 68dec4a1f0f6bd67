"""Run by an interpreter that has sae-lens and eai-sparsify: writes SAEs of every layout, each with its own library's values.

``make FOLDER`` writes them; ``golden FOLDER`` those few that lie in the repository (tests/saes/golden); ``open FOLDER`` lets
SAELens's own loader open what graphlens wrote there, and writes its values beside it. Each SAE's folder gets a ``values.npz``,
and ``list.json`` names them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sae_lens.loading.pretrained_sae_loaders as loaders
import torch
from huggingface_hub.utils import EntryNotFoundError
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from safetensors.torch import save_file

D_IN, D_SAE, D_OUT, K, HEADS = 15, 37, 7, 5, 3
RESID = "blocks.2.hook_resid_post"
HOOKS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)
GOLDEN = (
    *("standard", "standard-hook_z", "standard-layer_norm", "gated", "jumprelu", "topk-rescaled", "trained-batchtopk"),
    *("skip_transcoder", "jumprelu_skip_transcoder", "old-topk", "old-hook_z"),
)


@dataclass
class Made:
    """An SAE that was written: its name, where, what opens it and what it gives."""

    name: str
    folder: Path
    oracle: str
    values: dict[str, np.ndarray]
    asked: dict[str, str]


def torch_seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def filled(sae: SAE, name: str) -> SAE:
    """Random weights in place of those that an untrained SAE has: zeros show nothing."""
    random = torch_seeded(name)
    for key, parameter in sae.state_dict().items():
        found = torch.randn(parameter.shape, generator=random, dtype=torch.float64) * (
            0.3 if parameter.ndim == 2 else 0.2
        )
        parameter.copy_(found.abs() if "threshold" in key else found)
    return sae


def activations(sae: SAE | None, name: str, heads: bool) -> torch.Tensor:
    x = torch.randn(2, 5, D_IN, generator=torch_seeded(name + "x")) * 2 + 0.3
    return x.reshape(2, 5, HEADS, -1) if heads else x


@torch.no_grad()
def values_of(sae: SAE, x: torch.Tensor) -> dict[str, np.ndarray]:
    """What SAELens's own SAE makes of activations: each hook's value with the error term, encode, decode, and the whole."""
    transcoder = "transcoder" in sae.cfg.architecture()
    if not transcoder:
        sae.use_error_term = True
    _, cache = sae.run_with_cache(x)
    found = {name: cache[name].numpy() for name in HOOKS if name in cache}
    sae.use_error_term = False
    features = sae.encode(x)
    return {
        **found,
        "x": x.numpy(),
        "encode": features.numpy(),
        "decode": cache["hook_sae_recons"].numpy(),
        "whole": sae(x).numpy(),
    }


def config(architecture: str, training: bool, **changes: object) -> dict[str, object]:
    said: dict[str, object] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "architecture": architecture,
        "dtype": "float32",
        "device": "cpu",
    }
    if "transcoder" in architecture:
        said |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
    hook = "blocks.2.attn.hook_z" if changes.get("reshape_activations") == "hook_z" else RESID
    metadata = {
        "hook_name": hook,
        "model_name": "tiny",
        "context_size": 64,
        "prepend_bos": False,
        "sae_lens_version": "6.54.0",
    }
    if "transcoder" in architecture:
        metadata |= {"hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.hook_mlp_out"}
    return {**said, "metadata": metadata, **changes}


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "standard": ("standard", {}),
    "standard-no_b_dec": ("standard", {"apply_b_dec_to_input": False}),
    "standard-hook_z": ("standard", {"reshape_activations": "hook_z"}),
    "standard-constant_norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "standard-layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "standard-expected_average": ("standard", {"normalize_activations": "expected_average_only_in"}),
    "gated": ("gated", {}),
    "gated-layer_norm": ("gated", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu-hook_z": ("jumprelu", {"reshape_activations": "hook_z", "normalize_activations": "layer_norm"}),
    "topk": ("topk", {"k": K}),
    "topk-rescaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "topk-constant_norm": (
        "topk",
        {"k": K, "normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": False},
    ),
    "transcoder": ("transcoder", {}),
    "skip_transcoder": ("skip_transcoder", {}),
    "skip_transcoder-layer_norm": ("skip_transcoder", {"normalize_activations": "layer_norm"}),
    "jumprelu_transcoder": ("jumprelu_transcoder", {}),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", {}),
}
TRAINED: dict[str, dict[str, object]] = {
    "batchtopk": {"k": float(K)},
    "batchtopk-unrescaled": {"k": float(K), "rescale_acts_by_decoder_norm": False},
    "matryoshka_batchtopk": {"k": float(K), "matryoshka_widths": [11, D_SAE]},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": K, "rescale_acts_by_decoder_norm": True},
}


def saelens_made(root: Path) -> Iterator[Made]:
    """Folders that SAE.save_model writes, in float32 and in two others."""
    for name, (architecture, changes) in CASES.items():
        sae = filled(SAE.from_dict(config(architecture, False, **changes)), name)
        folder = root / name
        sae.save_model(folder)
        x = activations(sae, name, changes.get("reshape_activations") == "hook_z")
        yield Made(name, folder, "SAE.load_from_disk", values_of(SAE.load_from_disk(folder), x), {})
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        name = f"jumprelu-{str(dtype).removeprefix('torch.')}"
        sae = filled(SAE.from_dict(config("jumprelu", False)), name).to(dtype=dtype)
        folder = root / name
        sae.save_model(folder)
        opened = SAE.load_from_disk(folder, dtype="float32")
        yield Made(name, folder, "SAE.load_from_disk", values_of(opened, activations(sae, name, False)), {})


def trained_made(root: Path) -> Iterator[Made]:
    """What a training saves: its inference model, and its checkpoint, which is to mean the same."""
    for name, changes in TRAINED.items():
        architecture = name.removesuffix("-unrescaled")
        said = config(architecture, True, **changes)
        sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
        sae = filled(sae_class(config_class.from_dict(said)), name)
        folder, checkpoint = root / f"trained-{name}", root / f"checkpoint-{name}"
        sae.save_model(checkpoint)
        sae.save_inference_model(folder)
        x = activations(sae, name, False)
        values = values_of(SAE.load_from_disk(folder), x)
        yield Made(f"trained-{name}", folder, "SAE.load_from_disk", values, {})
        # Its pre-activations and features count in other units before the norms are folded; a checkpoint is read as it will be.
        if architecture == "topk":
            values = {key: value for key, value in values.items() if key not in ("hook_sae_acts_pre",)}
        yield Made(f"checkpoint-{name}", checkpoint, "TrainingSAE.save_inference_model", values, {})


OLD: dict[str, tuple[str, dict[str, object]]] = {
    "old-standard": (
        "standard",
        {"hook_point": RESID, "hook_point_layer": 2, "normalize_activations": False, "use_ghost_grads": True},
    ),
    "old-hook_z": (
        "standard",
        {"hook_name": "blocks.1.attn.hook_z", "activation_fn_str": "relu", "normalize_activations": "none"},
    ),
    "old-topk": ("topk", {"hook_name": RESID, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
    "old-gated": ("gated", {"hook_name": RESID, "architecture": "gated", "sae_lens_training_version": "4.0.1"}),
    "old-jumprelu": ("jumprelu", {"hook_name": RESID, "architecture": "jumprelu", "apply_b_dec_to_input": False}),
}


def old_made(root: Path) -> Iterator[Made]:
    """Folders as SAELens 2 to 5 wrote them."""
    for name, (architecture, said) in OLD.items():
        changes = {"k": K} if architecture == "topk" else {}
        sae = filled(SAE.from_dict(config(architecture, False, **changes)), name)
        folder = root / name
        sae.save_model(folder)
        state = {key: value.clone() for key, value in sae.state_dict().items()}
        if name == "old-standard":
            state["scaling_factor"] = torch.ones(D_SAE)
        save_file(state, folder / "sae_weights.safetensors")
        old = {
            "d_in": D_IN,
            "d_sae": D_SAE,
            "dtype": "torch.float32",
            "device": "cpu",
            "model_name": "gpt2-small",
            **said,
        }
        old |= {"context_size": 128, "dataset_path": "text", "finetuning_scaling_factor": False}
        (folder / "cfg.json").write_text(json.dumps(old))
        x = activations(sae, name, "hook_z" in str(said.get("hook_name")))
        yield Made(name, folder, "SAE.load_from_disk", values_of(SAE.load_from_disk(folder), x), {})


def by_loader(loader: Callable[..., object], root: Path, repository: str, folder: str) -> SAE:
    """What one of SAELens's loaders makes of a repository that lies in ``root``."""

    def local(repo_id: str, filename: str, subfolder: str | None = None, **rest: object) -> str:
        found = root / repo_id / (subfolder or "") / filename
        if not found.exists():
            raise EntryNotFoundError(str(found))
        return str(found)

    loaders.hf_hub_download = local
    overrides = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    if "transcoders" in repository:
        overrides["d_out"] = D_OUT
    said, state, _ = loader(repository, folder, "cpu", False, overrides)
    said = loaders.handle_config_defaulting(said)
    sae = SAE.from_dict(said)
    sae.load_state_dict({key: value.contiguous() for key, value in state.items()})
    return sae


def gemma_made(root: Path) -> Iterator[Made]:
    """Gemma Scope's params.npz by SAELens's own loaders."""
    for kind, architecture in (
        ("res", "jumprelu"),
        ("mlp", "jumprelu"),
        ("att", "jumprelu"),
        ("transcoders", "jumprelu_transcoder"),
    ):
        name, repository, place = f"gemma-{kind}", f"google/gemma-scope-2b-pt-{kind}", "layer_3/width_16k/average_l0_71"
        state = filled(SAE.from_dict(config(architecture, False)), name).state_dict()
        folder = root / "gemma" / repository / place
        folder.mkdir(parents=True)
        old = {"W_enc": "w_enc", "W_dec": "w_dec"} if kind == "mlp" else {}  # both spellings are on the hub
        np.savez(folder / "params.npz", **{old.get(key, key): value.numpy() for key, value in state.items()})
        loader = (
            loaders.gemma_2_transcoder_huggingface_loader
            if kind == "transcoders"
            else loaders.gemma_2_sae_huggingface_loader
        )
        sae = by_loader(loader, root / "gemma", repository, place)
        yield Made(name, folder, loader.__name__, values_of(sae, activations(sae, name, kind == "att")), {})
    name, repository, place = "gemma-embedding", "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_21"
    state = filled(SAE.from_dict(config("jumprelu", False)), name).state_dict()
    folder = root / "gemma" / repository / place
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{key: value.numpy() for key, value in state.items()})
    sae = by_loader(loaders.gemma_2_sae_huggingface_loader, root / "gemma", repository, place)
    yield Made(name, folder, "gemma_2_sae_huggingface_loader", values_of(sae, activations(sae, name, False)), {})


DICTIONARIES = {
    "AutoEncoder": (
        "standard",
        {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias", "b_dec": "bias"},
    ),
    "GatedAutoEncoder": (
        "gated",
        {
            "W_enc": "encoder.weight",
            "W_dec": "decoder.weight",
            "b_dec": "decoder_bias",
            "b_gate": "gate_bias",
            "b_mag": "mag_bias",
        },
    ),
    "JumpReluAutoEncoder": ("jumprelu", {}),
    "AutoEncoderTopK": ("topk", {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}),
    "BatchTopKSAE": ("jumprelu", {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", {}),
}


def dictionary_made(root: Path) -> Iterator[Made]:
    """dictionary_learning's folders, converted from ae.pt, by SAELens's loader of the ae.pt."""
    for kind, (architecture, names) in DICTIONARIES.items():
        changes = {"k": K} if architecture == "topk" else {}
        state = filled(SAE.from_dict(config(architecture, False, **changes)), kind).state_dict()
        theirs = {
            names.get(key, key): (value.T if names.get(key, "").endswith("weight") else value).contiguous()
            for key, value in state.items()
        }
        if "TopK" in kind:
            theirs |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.4)}
        folder = root / "dictionaries" / "someone/dictionaries" / kind
        folder.mkdir(parents=True)
        torch.save(theirs, folder / "ae.pt")
        save_file(torch.load(folder / "ae.pt", weights_only=True), folder / "ae.safetensors")
        trainer = {
            "dict_class": kind,
            "layer": 2,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "lm_name": "EleutherAI/pythia-70m",
            "k": K,
        }
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        sae = by_loader(
            loaders.dictionary_learning_sae_huggingface_loader_1, root / "dictionaries", "someone/dictionaries", kind
        )
        values = values_of(sae, activations(sae, kind, False))
        yield Made(f"dictionary-{kind}", folder, "dictionary_learning_sae_huggingface_loader_1", values, {})


@torch.no_grad()
def sparsify_made(root: Path) -> Iterator[Made]:
    """sparsify's own folders and values."""
    from sparsify import SparseCoder, SparseCoderConfig

    for name, place, said in (
        ("sparsify-sae", "layers.2", {}),
        ("sparsify-wide", "layers.2.mlp", {"num_latents": D_SAE}),
        ("sparsify-transcoder", "layers.2.mlp", {"transcode": True}),
        ("sparsify-skip", "h.2.mlp", {"transcode": True, "skip_connection": True}),
    ):
        coder = SparseCoder(D_IN, SparseCoderConfig(**{"expansion_factor": 3, "k": K, **said}))
        filled(coder, name)
        folder = root / "sparsify" / name / place
        coder.save_to_disk(folder)
        (folder.parent / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m", "ctx_len": 2048}))
        x = activations(None, name, False)
        flat = x.reshape(-1, D_IN)
        acts, indices, _ = SparseCoder.load_from_disk(folder).encode(flat)
        features = torch.zeros(len(flat), coder.num_latents).scatter(-1, indices, acts)
        values = {"encode": features, "decode": coder.decode(acts, indices), "whole": coder(flat).sae_out}
        shaped = {key: value.reshape(2, 5, -1).numpy() for key, value in values.items()}
        yield Made(name, folder, "sparsify.SparseCoder.load_from_disk", {"x": x.numpy(), **shaped}, {})


def written(made: Made, root: Path) -> dict[str, object]:
    np.savez(made.folder / "values.npz", **made.values)
    return {"name": made.name, "folder": str(made.folder.relative_to(root)), "oracle": made.oracle, "asked": made.asked}


MAKERS = (saelens_made, trained_made, old_made, gemma_made, dictionary_made, sparsify_made)


def make(root: Path, golden: bool) -> None:
    found = []
    for maker in MAKERS[:3] if golden else MAKERS:
        for made in maker(root):
            if not golden or made.name in GOLDEN:
                found.append(written(made, root))
            else:
                shutil.rmtree(made.folder)
    (root / "list.json").write_text(json.dumps(found, indent=1) + "\n")


def opened(root: Path) -> None:
    """Opens what graphlens wrote into each folder of ``root``, and writes SAELens's values beside it."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        x = torch.from_numpy(np.load(folder / "x.npy"))
        np.savez(folder / "values.npz", **values_of(SAE.load_from_disk(folder), x))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    assert issubclass(TrainingSAE, SAE)
    what, place = sys.argv[1], Path(sys.argv[2])
    assert {*CASES, *OLD, *(f"trained-{name}" for name in TRAINED)} >= set(GOLDEN)
    if what == "open":
        opened(place)
    else:
        make(place, golden=what == "golden")
