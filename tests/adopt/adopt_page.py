"""The support table: which kinds of file of which families were adopted, and how right they are."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version

from tests.adopt.adopt_files import QUANTISED, ROUTES
from tests.adopt.cells import Cell
from tests.adopt.checkpoints import FAMILIES

SHOWN = {"gpt2": "GPT-2", "llama": "Llama, GQA", "qwen3": "Qwen 3", "neox": "GPT-NeoX", "gemma2": "Gemma 2"}
SHOWN |= {"bert": "BERT", "vit": "ViT"}
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai")
INTRODUCTION = """# ONNX files of other tools

What `graphlens adopt` finds in files that graphlens did not export. `python -m tests.adopt --all --table docs/adopted-files.md`
makes every file, adopts it and writes this page.

Each model is tiny, random and of odd sizes. A cell says how many of the family's hook points were found, and:

- in float files, the largest difference of any activation or of the logits from transformers with torch hooks, as a share of
  the largest number there (or of 1). Prompts are plain, padded on either side, and continued from past keys and values where a
  file has them. Edits at hook points are compared with the same edits in transformers too. Where a tool computes something else
  on purpose (optimum's O3 takes the tanh formula of gelu, its Gemma 2 has no soft cap of attention scores, the genai builder
  rounds the factor of Gemma's embeddings), transformers' model does the same;
- in quantised files, the largest residual of the identities between activations (`id`), which need no reference. It may be 1e-5
  in all of them. Static quantisers (QDQ, QOperator) are taken out of the graph for that, and each hook point of the file as it is
  holds what its quantiser is given, to half a step.

In every file each weight is compared with that of graphlens's own export; a Python hook, an intervention and a baked file give
the same logits; and a copy with other names, without metadata and in another order is adopted to the same numbers. A cell in
bold falls short of that. `-` is a file that its own tool does not make; the words of the tool are below.
"""


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    if cell.absent:
        return "-"
    if not cell.hooks:
        return "**not adopted**"
    told = f"id {cell.identity:.0e}" if ROUTES[cell.route].numbers == QUANTISED else f"{cell.worst:.0e}"
    text = f"{cell.hooks}/{cell.wanted}, {told}"
    return text if cell.right else f"**{text}**"


def page(cells: Sequence[Cell]) -> str:
    """The page of all cells, in Markdown."""
    found = {(cell.family, cell.route): cell for cell in cells}
    rows = [
        "| kind of file | " + " | ".join(SHOWN[family] for family in FAMILIES) + " |",
        "|---" * (len(FAMILIES) + 1) + "|",
    ]
    for name, route in ROUTES.items():
        shown = [_cell(found.get((family, name))) if family in route.families else "" for family in FAMILIES]
        if any(shown):
            rows.append(f"| {route.said} | {' | '.join(shown)} |")
    refused: dict[str, list[str]] = {}
    short: list[str] = []
    for (family, name), cell in found.items():
        if name not in ROUTES or family not in FAMILIES:
            continue
        if cell.absent:
            said = re.sub(
                r"\S*/(?=[\w.-]+\.onnx\b)", "", " ".join(cell.absent.split())
            )  # without the folder of the files
            refused.setdefault(said[:240], []).append(f"{SHOWN[family]}: {ROUTES[name].said}")
        elif not cell.right:
            more = f" ({len(cell.failures)} such lines)" if len(cell.failures) > 1 else ""
            short.append(f"- {SHOWN[family]}, {ROUTES[name].said}: {' '.join(cell.failures[0].split())[:300]}{more}")
    lines = [INTRODUCTION, *rows, ""]
    if short:
        lines += ["## What falls short", "", *sorted(short), ""]
    if refused:
        lines += ["## Files that are not made", ""]
        lines += [f"- {'; '.join(sorted(which))}: `{why.replace('`', '')}`" for why, which in sorted(refused.items())]
        lines += [""]
    seconds = sorted(cell.seconds for cell in cells if cell.hooks and cell.family in FAMILIES)
    if seconds:
        lines += [
            f"Adopting took {seconds[len(seconds) // 2]:.1f} s in the median and {seconds[-1]:.1f} s at most.",
            "",
        ]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines += [
        f"Made with {versions}; optimum-onnx 0.1.0 with transformers 4.57 in an environment of its own. On {machine}.",
        "",
    ]
    return "\n".join(lines)
