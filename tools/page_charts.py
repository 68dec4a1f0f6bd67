"""Charts of the documentation's tables: each is drawn from the page that shows it, and from nothing else.

A test draws them again and compares, so that a table which changes takes its picture with it: ``python -m tools.pictures``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.drawing import Kind, Strip, shares, strips

DOCS = Path(__file__).resolve().parents[1] / "docs"
FACTOR = re.compile(r"\*{0,2}([\d.]+)x\*{0,2}$")
MET: tuple[tuple[Kind, str], ...] = (
    ("blue", "within its target"),
    ("orange", "beyond its target"),
    ("grey", "has no target"),
)
LIBRARIES = ("plain ONNX Runtime", "TransformerLens 4.3", "TransformerLens 3.9", "nnsight", "transformers")


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        section: The heading above it, without its command.
        header: The cells of its first line.
        rows: Those of the others.
    """

    section: str
    header: list[str]
    rows: list[list[str]]


def tables(page: str) -> Iterator[Table]:
    """The tables of a page of docs/, in order."""
    section, found = "", None
    for line in (DOCS / f"{page}.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ").partition(" (`")[0]
        if not line.startswith("|"):
            if found:
                yield found
            found = None
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if found is None:
            found = Table(section, cells, [])
        elif not re.fullmatch(r"[\s|:-]+", line):
            found.rows.append(cells)
    if found:
        yield found


def ratios(page: str, title: str, by: str = "{section}", bar: str = "as much") -> str:
    """How much graphlens takes beside the others, a dot for each row of a page that tools/bench wrote.

    Args:
        page: The page of docs/.
        title: What stands above.
        by: Which rows share a line, made of the section, the library that the row names, ``what`` (memory or that library) and
            ``memory`` (", memory" in rows of memory).
        bar: What a ratio of 1 means.
    """
    lines: dict[str, list[tuple[float, Kind]]] = {}
    for table in tables(page):
        column = next((name for name in ("ratio", "new / old") if name in table.header), None)
        if column is None:
            continue
        for row in table.rows:
            match = FACTOR.match(row[table.header.index(column)])
            if match is None:
                continue
            library = next((name for name in LIBRARIES if name in row[0]), table.section)
            what = "memory" if "memory" in row[0] else library
            kind: Kind = "blue" if row[-1] == "ok" else "orange" if row[-1] == "over" else "grey"
            name = by.format(section=table.section, library=library, what=what, memory=", memory" * (what == "memory"))
            lines.setdefault(name.replace(f"{table.section}: {table.section}", table.section), []).append(
                (float(match[1]), kind)
            )
    drawn = [Strip(name, lines[name]) for name in sorted(lines, key=lambda name: name.endswith("memory"))]
    kinds = {kind for _, dots in lines.items() for _, kind in dots}
    legend = tuple(each for each in MET if each[0] in kinds)
    return strips(title, title, drawn, (1.0, bar), "x", legend)


def allowed(page: str, title: str) -> str:
    """Each figure of a page that has a target, as a share of what is allowed."""
    lines = []
    for table in tables(page):
        for row in table.rows if "target" in table.header else []:
            match = re.fullmatch(r"([\d.]+) (\S+) <= ([\d.]+) \2", row[table.header.index("target")])
            if match:
                share = float(match[1]) / float(match[3])
                kind: Kind = "blue" if row[-1] == "ok" else "orange"
                lines.append(Strip(row[0], [(share, kind)], f"{match[1]} of {match[3]} {match[2]}"))
    return strips(title, title, lines, (1.0, "what is allowed"), "x")


def columns(page: str, title: str, bar: str) -> str:
    """A line for each column of a page's tables that holds factors; bold ones are more than is wanted."""
    lines: dict[str, list[tuple[float, Kind]]] = {}
    for table in tables(page):
        for at, name in enumerate(table.header):
            found = [(FACTOR.match(row[at]), row[at].startswith("*")) for row in table.rows]
            if found and all(match for match, _ in found):
                label = name.replace("`", "") if name != "ratio" else "every hook point fetched"
                dots: list[tuple[float, Kind]] = [
                    (float(match[1]), "orange" if bold else "blue") for match, bold in found if match
                ]
                lines.setdefault(label, []).extend(dots)
    short = {name: name if len(name) < 40 else name[:37].rpartition(" ")[0] + " …" for name in lines}
    return strips(title, title, [Strip(short[name], dots) for name, dots in lines.items()], (1.0, bar), "x")


def speed() -> str:
    """The ratios of the summary."""
    (table,) = tables("speed")
    title = "How long graphlens takes, beside the other of each row (dots left of the line: less)"
    lines: dict[str, list[tuple[float, Kind]]] = {}
    for row in table.rows:
        value = float(row[table.header.index("ratio")].removesuffix("x"))
        lines.setdefault(row[table.header.index("beside")], []).append((value, "blue" if value <= 1.05 else "orange"))
    legend: tuple[tuple[Kind, str], ...] = (("blue", "less, or at most 5 % more"), ("orange", "more"))
    return strips(title, title, [Strip(name, dots) for name, dots in lines.items()], (1.0, "as much"), "x", legend)


def live() -> str:
    """What the live page takes beside a bare session."""
    (table,) = tables("benchmarks-live")
    lines = []
    for name, page, bare in table.rows:
        pair = [re.fullmatch(r"([\d,.]+) ms", cell) for cell in (page, bare)]
        if all(pair):
            ours, floor = (float(match[1].replace(",", "")) for match in pair if match)
            lines.append(Strip(name, [(ours, "blue"), (floor, "grey")], f"{ours / floor:.1f}x"))
    title = "An answer of the live page, in milliseconds"
    legend: tuple[tuple[Kind, str], ...] = (
        ("blue", "the page, on one thread of WebAssembly"), ("grey", "a bare session, on two cores")
    )  # fmt: skip
    return strips(title, title, lines, None, " ms", legend)


def faults() -> str:
    """What was found after each kill."""
    (table,) = tables("faults")
    rows = [(row[0], [int(row[table.header.index(name)]) for name in ("absent", "old", "new")]) for row in table.rows]
    legend = (
        ("pale", "nothing, and nothing was there before"),
        ("grey", "what was there before"),
        ("blue", "what was to be there"),
    )
    title = "What was found after a kill, as shares of the kills of each job: never a half-written file"
    return shares(title, title, rows, legend, "kills")


def hostile() -> str:
    """How the cases of each group ended."""
    (table,) = tables("hostile")
    good = [table.header.index(name) for name in ("clean error", "right")]
    rows = []
    for row in table.rows:
        ends = [int(row[at]) for at in good]
        rows.append((row[0], [*ends, int(row[1]) - sum(ends)]))
    legend = (("pale", "an error that names what is wrong"), ("blue", "the right number"), ("orange", "anything else"))
    title = "How the hostile cases ended, as shares of each group"
    return shares(title, title, rows, legend, "cases")


def security() -> str:
    """The two pages of trials that stand behind the promises."""
    (table,) = tables("hostile")
    everything = next(row for row in table.rows if row[0] == "all")
    good = [int(everything[table.header.index(name)]) for name in ("clean error", "right")]
    (kills,) = tables("faults")
    found = sum(int(row[kills.header.index(name)]) for row in kills.rows for name in ("absent", "old", "new"))
    killed = sum(int(row[kills.header.index("killed")]) for row in kills.rows)
    rows = [
        ("hostile files and calls", [*good, int(everything[1]) - sum(good)]),
        ("kills while something is written", [0, found, killed - found]),
    ]
    legend = (("pale", "an error that names what is wrong"), ("blue", "right, or whole"), ("orange", "anything else"))
    title = "What was tried against the promises, and how it ended"
    return shares(title, title, rows, legend, "trials")


def gpu() -> str:
    """Differences of the GPU from the CPU, and what is allowed."""
    (table,) = tables("gpu")
    lines = [
        Strip(what, [(float(value), "blue" if float(value) <= float(most) else "orange")], number_or_none(value), float(most))
        for what, value, most in table.rows
    ]  # fmt: skip
    title = "Largest difference between the GPU and the CPU, and what is allowed (dashed)"
    return strips(title, title, lines)


def number_or_none(value: str) -> str:
    """A number of a table in words."""
    return "none" if float(value) == 0 else value


def adopted_files() -> str:
    """How far each family's adopted files are from transformers."""
    table = next(tables("adopted-files"))
    lines = []
    for at, family in enumerate(table.header[1:], 1):
        dots: list[tuple[float, Kind]] = []
        whole = 0
        for row in table.rows:
            match = re.fullmatch(r"(\d+)/(\d+), (id )?([\d.e-]+)", row[at])
            if match:
                whole += match[1] == match[2]
                kind: Kind = "orange" if match[1] != match[2] else "grey" if match[3] else "blue"
                dots.append((float(match[4]), kind))
        lines.append(Strip(family, dots, f"{whole} of {len(dots)} whole"))
    title = "Adopted files of each family: the largest difference, as a share of the largest number"
    legend: tuple[tuple[Kind, str], ...] = (
        ("blue", "from transformers (float files; float16 at the right)"), ("grey", "of the identities (quantised files)"),
        ("orange", "a hook point is missing"),
    )  # fmt: skip
    return strips(title, title, lines, (1e-5, "allowed of identities"), "", legend)


def models() -> str:
    """The largest differences of every exported architecture."""
    lines: dict[str, list[tuple[float, Kind]]] = {}
    for table in tables("models"):
        if table.header[:2] != ["variant", "hook points"]:
            continue
        for row in table.rows:
            found = [float(cell) for cell in row[2:] if re.fullmatch(r"[\d.]+e-\d+", cell)]
            dots: list[tuple[float, Kind]] = [(value, "blue" if value <= 5e-5 else "orange") for value in found]
            lines.setdefault(table.section, []).extend(dots)
    title = "Largest differences from transformers and TransformerLens 3.9, as a share of the largest number"
    return strips(title, title, [Strip(name, dots) for name, dots in lines.items() if dots], (5e-5, "allowed"))


def parity() -> str:
    """Reading and editing each hook point, beside TransformerLens."""
    table = next(tables("parity"))
    lines: dict[str, list[tuple[float, Kind]]] = {}
    for row in table.rows:
        part = row[1].replace("`", "").removeprefix("blocks.i.")
        name = f"{part.rpartition('.')[0]}.*" if "." in part else "logits" if part == "logits" else "hook_*"
        lines.setdefault(name, []).extend((float(cell), "blue") for cell in row[3:5] if cell)
    title = "Largest differences from TransformerLens 3.9, each hook point read and edited"
    return strips(title, title, [Strip(name, dots) for name, dots in lines.items()], (5e-5, "allowed by the tests"))


def transformerlens() -> str:
    """How much of each module of TransformerLens there is."""
    text = (DOCS / "transformerlens.md").read_text(encoding="utf-8")
    counts: dict[str, list[int]] = {}
    for section in re.split(r"^### ", text.partition("## The API")[2], flags=re.M)[1:]:
        name = section.partition("\n")[0].strip("`")
        same = sum(
            len(re.findall(r"`[^`]+`", line.partition(":")[2]))
            for line in section.splitlines()
            if "the same: " in line.lower()
        )
        rows = re.findall(r"^\| .* \| (different|absent) \|", section, re.M)
        if "`transformer_lens" in section.partition("\n")[0]:
            counts[name] = [same, rows.count("different"), rows.count("absent")]
    largest = sorted(counts, key=lambda name: -sum(counts[name]))[:12]
    rest = [counts[name] for name in counts if name not in largest]
    rows_ = [(name.removeprefix("transformer_lens.") or name, counts[name]) for name in counts if name in largest]
    rows_.append(("the other modules", [sum(column) for column in zip(*rest, strict=True)]))
    title = "Public names of TransformerLens 3.9, by module"
    return shares(
        title,
        title,
        rows_,
        (("blue", "the same"), ("pale", "different, as the table says"), ("orange", "absent")),
        "names",
    )


# Page -> what stands above the chart of its ratios, and which rows share a line.
RATIOS = {
    "benchmarks": ("graphlens beside plain ONNX Runtime: time and memory, a dot for each row", "{section}"),
    "benchmarks-interventions": ("Edits: time and memory beside the floor, a dot for each row", "{section}"),
    "benchmarks-sweeps": ("Sweeps and gradients beside each other way, a dot for each row", "{section}: {what}"),
    "benchmarks-peers": ("graphlens beside other libraries: time and memory, a dot for each row", "{library}{memory}"),
    "benchmarks-safety": ("What safety costs: after it, beside before it, a dot for each row", "{section}"),
    "benchmarks-house": ("Today beside 7f73819, a dot for each row", "{section}"),
    "benchmarks-scale": ("Harvests and streamed models beside their floors, a dot for each row", "{section}"),
    "benchmarks-saes": ("Runs with SAEs beside their products and beside SAELens, a dot for each row", "{section}"),
    "benchmarks-floor": ("Single runs beside a graph written by hand, a dot for each row", "{section}"),
    "benchmarks-gpu": ("On an H100, beside a bare CUDA session, a dot for each row", "{section}"),
}
ALLOWED = {
    "benchmarks-configs": "Models from a config: the time taken, as a share of what is allowed",
    "benchmarks-pages": "Pages: size and time, as a share of what is allowed",
}
COLUMNS = {
    "benchmarks-adopted": "Runs of adopted files beside the original in a bare session",
    "benchmarks-llama": "A Llama of 135M shape beside a bare session",
}
CHARTS: dict[str, Callable[[], str]] = {
    "speed.svg": speed,
    **{f"{page}.svg": partial(ratios, page, title, by) for page, (title, by) in RATIOS.items()},
    **{f"{page}.svg": partial(allowed, page, title) for page, title in ALLOWED.items()},
    **{f"{page}.svg": partial(columns, page, title, "as long") for page, title in COLUMNS.items()},
    "benchmarks-live.svg": live,
    "faults.svg": faults,
    "hostile.svg": hostile,
    "security.svg": security,
    "gpu.svg": gpu,
    "adopted-files.svg": adopted_files,
    "models.svg": models,
    "parity.svg": parity,
    "transformerlens.svg": transformerlens,
}
