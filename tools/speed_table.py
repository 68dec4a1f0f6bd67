"""Writes docs/speed.md's table: ``python -m tools.speed_table``, or ``--check`` to be told that it is stale.

Every figure is taken from a row of the pages docs/benchmarks*.md, which a command of tools/bench printed; none is made here.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.generated import with_part, write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/speed.md"


@dataclass(frozen=True)
class Row:
    """A row of the summary.

    Attributes:
        what: What is done.
        beside: What it is compared with.
        page: The page that has the figure, "" for docs/benchmarks.md.
        section: Its section there.
        begins: How the row there begins.
    """

    what: str
    beside: str
    page: str
    section: str
    begins: str


MEMORY, HEADS = "b1 s512, peak memory of a process", "attn_head_out_by_pos b1 s15"
LENS4, LENS3 = "TransformerLens 4.3", "TransformerLens 3.9"
BARE, LOOP = "plain ONNX Runtime", "one forward per patch on ONNX Runtime"
FIRST = "patch the residual stream, nothing shared but the first token"
ONE_TOKEN = "12 layers x 15 positions, prompts that differ in one token"
# fmt: off
ROWS = (
    Row("open a file and read everything, fresh process", BARE, "", "cold_start", "b1 s16, wall"),
    Row("read all 210 hook points, 1 x 16 tokens", BARE, "", "full_cache", "b1 s16"),
    Row("read all 210 hook points, 8 x 32 tokens", BARE, "", "full_cache", "b8 s32"),
    Row("read all 210 hook points, 1 x 16 tokens", LENS4, "peers", "cache_peers", f"b1 s16, {LENS4}"),
    Row("read all 210 hook points, 1 x 16 tokens", LENS3, "peers", "cache_peers", f"b1 s16, {LENS3}"),
    Row("a Python hook on one head, 1 x 16 tokens", BARE, "", "one_hook", "b1 s16, blocks.5.attn.hook_z"),
    Row("a Python hook on one head, 1 x 16 tokens", "nnsight", "peers", "peers_one_hook", "b1 s16, nnsight"),
    Row("ablate a head by data, 1 x 16 tokens", BARE, "interventions", "one_edit", "b1 s16, one head ablated"),
    Row("run a baked file, 1 x 16 tokens", BARE, "interventions", "baked", "b1 s16"),
    Row("the first layer of 12 alone, 1 x 16 tokens", "a whole run", "peers", "stop_at_layer", "b1 s16"),
    Row("generate 64 tokens", "transformers", "peers", "generation", "64 new tokens, no hook"),
    Row("memory, a forward of 1 x 512 tokens", BARE, "peers", "peers_forward", f"{MEMORY}, {BARE}"),
    Row("memory, a forward of 1 x 512 tokens", LENS3, "peers", "peers_forward", f"{MEMORY}, {LENS3}"),
    Row(f"patch the residual stream, {ONE_TOKEN}", LOOP, "sweeps", "sweep_one_token", f"resid_pre b8 s15, {BARE}"),
    Row(f"patch the residual stream, {ONE_TOKEN}", LENS4, "sweeps", "sweep_one_token", f"resid_pre b8 s15, {LENS4}"),
    Row(FIRST, LENS4, "sweeps", "sweep_resid_pre", f"resid_pre b8 s15, {LENS4}"),
    Row("patch every head at every position, nothing shared", LENS4, "sweeps", "sweep_heads_by_pos", f"{HEADS}, {LENS4}"),
    Row("gradients at every hook point, 8 x 16 tokens", "one forward", "sweeps", "gradients", "to every hook point"),
    Row("the same at resid_pre and hook_z", "torch autograd", "sweeps", "gradients", "the same"),
    Row("attribution patching, 2,160 sites", "patching them", "sweeps", "attribution", "2,160 sites"),
    Row("a forward on an H100, 8 x 128 tokens", "a plain CUDA session", "gpu", "on_gpu", "b8 s128, forward"),
)
# fmt: on


def figures(row: Row) -> tuple[str, str, str]:
    """graphlens's figure, the other's, and their ratio, as the page has them.

    Raises:
        ValueError: If the page has no such row, or several.
    """
    name = f"benchmarks-{row.page}.md" if row.page else "benchmarks.md"
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(row.section)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    lines = [line for line in (found[1] if found else "").splitlines() if line.startswith(f"| {row.begins}")]
    exact = [line for line in lines if line.startswith(f"| {row.begins} |")]
    if len(exact or lines) != 1:
        raise ValueError(f"docs/{name}, {row.section}: {len(exact or lines)} rows begin with {row.begins!r}, not one.")
    cells = [re.sub(r" \([^)]*\)$", "", cell.strip()) for cell in (exact or lines)[0].strip("|").split("|")]
    ours, theirs, ratio = cells[1:4]
    if not (ours and theirs and re.fullmatch(r"[\d.]+x", ratio)):
        raise ValueError(f"docs/{name}, {row.section}: the row {row.begins!r} lacks a figure: {cells}.")
    return ours, theirs, ratio


def table() -> list[str]:
    """The summary as the lines of a Markdown table."""
    lines = ["| what | graphlens | beside | its figure | ratio | page |", "|---|---:|---|---:|---:|---|"]
    for row in ROWS:
        ours, theirs, ratio = figures(row)
        name = f"benchmarks-{row.page}" if row.page else "benchmarks"
        link = f"[{row.section}]({name}.md#{row.section})"
        lines.append(f"| {row.what} | {ours} | {row.beside} | {theirs} | {ratio} | {link} |")
    return lines


def page() -> str:
    """docs/speed.md as it has to be."""
    return with_part(PAGE, "tools/speed_table.py", table())


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or with ``--check`` compares it. Returns the exit code: 1 for a stale page."""
    return write_or_check(PAGE, page, "python -m tools.speed_table", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
