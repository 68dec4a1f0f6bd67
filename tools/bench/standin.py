"""The models that are measured: random weights, made once, exported, and stripped for the floor.

Everything that needs torch or onnx-ir happens in a process of its own, so that its memory is never measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from tools.bench.children import ChildRun, run_child

# Name -> arguments of transformers' config: GPT-2's, and Llama's where they say so.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},  # GPT2Config's own defaults are GPT-2 small's
    "large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "llama-135m": {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}


class Standin:
    """A model's files and sizes, each made when first asked for: an export of the large one takes a minute.

    ``checkpoint``: its folder. ``workdir``: where its other files lie, on one file system. ``package``: the graphlens that
    makes them, and ``child``: runs a function in a process that imports that one.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Path,
        workdir: Path,
        package: Path | None = None,
        child: Callable[..., ChildRun] = run_child,
    ) -> None:
        self.name, self.checkpoint, self.workdir = name, checkpoint, workdir
        self._package, self._child = package or _package(), child
        # The checkpoint's, and so the hooked file's: exports link their weights.
        self.weights_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))

    def made_by(self, tree: Path, child: Callable[..., ChildRun]) -> Standin:
        """The same model with files that another version of graphlens makes: it may not open what this one writes.

        ``tree``: the folder of its package and embedded models. ``child``: see above.
        """
        embedded = self.checkpoint.resolve().parent == _embedded().parent
        checkpoint = tree / "models" / self.checkpoint.name if embedded else self.checkpoint
        return Standin(self.name, checkpoint, self.workdir / tree.name, tree / "graphlens", child)

    @cached_property
    def hooked(self) -> Path:
        """The hooked folder."""
        if (self.checkpoint / "model.onnx").is_file():
            return self.checkpoint
        return self._once("hooked", _export, self.checkpoint)

    @cached_property
    def stripped(self) -> Path:
        """The graph without hooks, weights hardlinked beside it."""
        return self._once("stripped", _strip, self.hooked) / "model.onnx"

    @cached_property
    def by_hand(self) -> Path:
        """A graph without hooks that was written by hand: see ``tools/bench/by_hand.py``."""
        return self._once("by-hand", _by_hand, self.checkpoint) / "model.onnx"

    def made(self, kind: str, function: Callable[..., None], *arguments: Any) -> Path:
        """A folder with another file of the hooked one, which ``function(hooked, folder, *arguments)`` writes, once.

        The function runs in a child (see run_child). ``kind`` names what it makes, arguments included.
        """
        return self._once(kind, function, self.hooked, *arguments)

    def _once(self, kind: str, function: Callable[..., None], source: Path, *arguments: Any) -> Path:
        """The folder that ``function(source, folder, *arguments)`` makes in a child, once for the same code and source.

        What earlier versions left is removed.
        """
        folder = self.workdir / f"{kind}-{_digest(self._package, source)}"
        if not (folder / "model.onnx").is_file():
            self.workdir.mkdir(parents=True, exist_ok=True)
            for path in self.workdir.glob(f"{kind}-*"):
                shutil.rmtree(path)
            self._child(function, str(source), str(folder), *arguments)
        return folder

    @cached_property
    def _config(self) -> dict[str, int]:
        config: dict[str, int] = self._child(_read_config, str(self.hooked)).result
        return config

    @property
    def architecture(self) -> str:
        """transformers' name of the architecture: "gpt2", "llama"."""
        return str(json.loads((self.checkpoint / "config.json").read_text())["model_type"])

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self._config["n_layers"]

    @property
    def n_ctx(self) -> int:
        """The longest sequence, in tokens."""
        return self._config["n_ctx"]

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self._config["d_model"]

    @property
    def d_vocab(self) -> int:
        """The number of token ids."""
        return self._config["d_vocab"]


def prepare(model: str, workdir: Path) -> Standin:
    """Finds or makes a model: one of SHAPES, "tiny" (the embedded GPT-2), a checkpoint folder or a hooked folder."""
    if model in SHAPES:
        return Standin(model, _made_checkpoint(workdir / model / "checkpoint", SHAPES[model]), workdir / model)
    if model == "tiny":
        return Standin(model, _embedded(), workdir / model)
    given = Path(model).expanduser().resolve()
    if not given.is_dir():
        raise SystemExit(f"{model!r} is neither {', '.join(SHAPES)}, tiny nor a folder.")
    return Standin(given.name, given, workdir / f"{given.name}-{hashlib.sha256(bytes(given)).hexdigest()[:8]}")


def resized(model: Standin, layers: int) -> Standin:
    """A model of random weights with another number of layers and a GPT-2 checkpoint's other sizes."""
    sizes = json.loads((model.checkpoint / "config.json").read_text())
    shape = {name: sizes[name] for name in ("n_head", "n_embd", "n_positions", "vocab_size")}
    name = f"{model.name}-{layers}-layers"
    home = model.workdir.parent / name
    return Standin(name, _made_checkpoint(home / "checkpoint", {**shape, "n_layer": layers}), home)


def _package() -> Path:
    import graphlens

    return Path(graphlens.__file__).parent


def _embedded() -> Path:
    from graphlens import embedded_model

    return embedded_model().resolve()


def _digest(*folders: Path) -> str:
    """What an export depends on: graphlens's code, byte for byte, and a folder's files by name, size and time."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
        for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.onnx"))):
            stat = path.stat()
            digest.update(f"\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def _made_checkpoint(folder: Path, shape: dict[str, Any]) -> Path:
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        try:
            run_child(_save_random, str(partial), shape)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


# In a child


def _save_random(folder: str, shape: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"model_type": "gpt2", **shape})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _export(checkpoint: str, folder: str) -> None:
    import graphlens

    graphlens.export_model(checkpoint, folder, verify=False)


def _strip(hooked: str, folder: str) -> None:
    from graphlens import surgery

    surgery.save(surgery.strip(surgery.load(hooked)), folder)


def _read_config(hooked: str) -> dict[str, int]:
    from graphlens import surgery

    config = surgery.read_manifest(surgery.load(hooked, verify=False)).config
    return {"n_layers": config.n_layers, "n_ctx": config.n_ctx, "d_model": config.d_model, "d_vocab": config.d_vocab}


def _by_hand(checkpoint: str, folder: str) -> None:
    from tools.bench.by_hand import write_by_hand

    write_by_hand(checkpoint, folder)
