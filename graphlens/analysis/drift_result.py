"""DriftResult: how far one model's activations are from another's, hook point by hook point."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from graphlens.analysis.drift_figures import signal_to_noise
from graphlens.analysis.result import SweepResult
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.folder import replacing, user_path
from graphlens.file.names import split_name

if TYPE_CHECKING:
    from rich.table import Table

    from graphlens.views.pages import Report

FORMAT, FORMAT_VERSION = "graphlens.drift", 1
FIGURES = ("fresh", "relative", "cosine", "snr", "recovered")
OUTSIDE = "outside"  # the layer of hook points that lie in no block, in tables by layer
MAX_ROWS = 20  # of the table that a console shows


@dataclass(frozen=True)
class Drifted:
    """How far one hook point's activation is from the reference's.

    Attributes:
        hook: The hook point.
        relative: The root mean square of the difference, relative to the reference's: all error so far.
        cosine: The cosine between both; NaN where there is none (of integers, of zeros).
        fresh: The relative error that this step adds: that of the activation which the other model computes here when each
            hook point before had the reference's.
        heads: ``relative`` of each head; empty without heads.
        fresh_heads: ``fresh`` of each head.
        recovered: How much of the logits' error goes away when the reference's activation is put in here: 1 is all of it;
            negative where it grows. None where it was not tried.
        metric: What the metric's error became by it, as a share that went away; None without a metric.
        nodes: The nodes whose result this is, by their names in the other model's original file without what a quantiser adds
            at their ends; in the reference's where the other model was not adopted; empty where neither was.
    """

    hook: str
    relative: float
    cosine: float
    fresh: float
    heads: tuple[float, ...] = ()
    fresh_heads: tuple[float, ...] = ()
    recovered: float | None = None
    metric: float | None = None
    nodes: tuple[str, ...] = ()

    @property
    def layer(self) -> int | None:
        """The block; None outside the blocks."""
        return split_name(self.hook)[0]

    @property
    def role(self) -> str:
        """The name without its block: "attn.hook_z"."""
        return split_name(self.hook)[1]

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio in decibels, of all error so far."""
        return signal_to_noise(self.relative)

    def figure(self, name: str) -> float:
        """A figure by its name; NaN where it was not computed.

        Args:
            name: One of FIGURES.
        """
        value = {"relative": self.relative, "cosine": self.cosine, "fresh": self.fresh, "snr": self.snr}.get(name)
        value = self.recovered if name == "recovered" else value
        return math.nan if value is None else value


@dataclass(frozen=True)
class DriftResult:
    """How far a model's activations are from a reference's.

    Attributes:
        sites: The hook points that both models have, in firing order.
        logits: The relative error of the logits, or of what counts in their place.
        reference: The reference's name.
        other: The other model's.
        only_reference: The hook points that the reference alone has.
        only_other: Those that the other model alone has.
        shape: The prompts' (batch, positions).
        metric: The metric's name with its values in both models: (name, reference, other); None without one.
        notes: What a reader should know besides, a sentence each.
        end: "logits", or the hook point that counts in their place where a file gives none.
    """

    sites: tuple[Drifted, ...]
    logits: float
    reference: str = ""
    other: str = ""
    only_reference: tuple[str, ...] = ()
    only_other: tuple[str, ...] = ()
    shape: tuple[int, int] = (1, 1)
    metric: tuple[str, float, float] | None = None
    notes: tuple[str, ...] = ()
    end: str = "logits"
    _by_name: dict[str, Drifted] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name.update({site.hook: site for site in self.sites})

    def __repr__(self) -> str:
        worst = self.worst(1)
        first = f"; most fresh error: {worst[0].hook} {worst[0].fresh:.2g}" if worst else ""
        return f"DriftResult({len(self.sites)} hook points, {self.end} {self.logits:.2g}{first})"

    def __getitem__(self, hook: str) -> Drifted:
        found = self._by_name.get(hook)
        if found is None:
            alone = [("reference", self.only_reference), ("other model", self.only_other)]
            why = next((f"only the {whose} has it" for whose, names in alone if hook in names), "neither model has it")
            raise InputError(f"{hook!r}: {why}; result.sites has those of both.")
        return found

    @property
    def patched(self) -> bool:
        """True if the reference's activations were put in at some sites."""
        return any(site.recovered is not None for site in self.sites)

    def worst(self, n: int = 10, by: str | None = None) -> list[Drifted]:
        """The sites with the most error, the worst first; of equals, the one that fires first.

        Args:
            n: How many, 1 or more.
            by: "fresh", "relative", "cosine", "snr", or "recovered", of which the highest are the worst: putting the
                reference's activation in there helps most. Shares that round to the same hundredth are equal. None is
                "recovered" where there is such a figure, and "fresh" otherwise.

        Raises:
            InputError: For another figure, and n < 1.
        """
        n = checked_number(n, "n", least=1)
        by = ("recovered" if self.patched else "fresh") if by is None else by
        if not is_one_of(by, FIGURES):
            raise InputError(f"by={by!r}: it is one of {', '.join(FIGURES)}.")

        def badness(site: Drifted) -> float:
            value = site.figure(by)
            if by == "recovered":
                return round(value, 2)
            return -value if by in ("cosine", "snr") else value

        known = [site for site in self.sites if not math.isnan(site.figure(by))]
        return sorted(known, key=badness, reverse=True)[:n]  # sorting keeps the order of equals, reversed or not

    def nodes_to_exclude(self, n: int = 1, by: str | None = None) -> list[str]:
        """The names that a quantiser's ``nodes_to_exclude`` takes, of the worst sites that have some.

        Args:
            n: How many sites.
            by: See ``worst``.

        Returns:
            Names of nodes, see ``Drifted.nodes``; none where neither model is an adopted file.
        """
        having = [site for site in self.worst(max(len(self.sites), 1), by) if site.nodes]
        return list(dict.fromkeys(node for site in having[: checked_number(n, "n", least=1)] for node in site.nodes))

    def by_layer(self, figure: str = "fresh") -> SweepResult:
        """A figure by role and layer, to plot or select from.

        Args:
            figure: "fresh", "relative", "cosine", "snr" or "recovered".

        Returns:
            Axes "role" and "layer"; NaN where a layer has no such hook point.

        Raises:
            InputError: For another figure, and where there is none.
        """
        cells = {(site.role, _layer(site)): self._figure(site, figure) for site in self.sites}
        return _grid(cells, ("role", "layer"), figure)

    def by_head(self, role: str = "attn.hook_z", figure: str = "fresh") -> SweepResult:
        """A figure of each head by layer.

        Args:
            role: A hook point with heads, without its block.
            figure: "fresh" or "relative".

        Returns:
            Axes "layer" and "head".

        Raises:
            InputError: For another figure, and for a role without heads.
        """
        if not is_one_of(figure, ("fresh", "relative")):
            raise InputError(f"figure={figure!r}: of heads there is 'fresh' and 'relative'.")
        cells: dict[tuple[str, str], float] = {}
        for site in self.sites:
            if site.role == role:
                values = site.fresh_heads if figure == "fresh" else site.heads
                cells |= {(_layer(site), str(head)): value for head, value in enumerate(values)}
        if not cells:
            roles = sorted({site.role for site in self.sites if site.heads})
            raise InputError(f"role={role!r} has no heads in this result; there is {', '.join(roles) or 'none'}.")
        return _grid(cells, ("layer", "head"), figure)

    @staticmethod
    def _figure(site: Drifted, figure: str) -> float:
        """A figure of a site. Raises InputError for one that there is not."""
        if not is_one_of(figure, FIGURES):
            raise InputError(f"figure={figure!r}: it is one of {', '.join(FIGURES)}.")
        return site.figure(figure)

    def plot(self, path: str | os.PathLike[str] | None = None, figure: str = "fresh") -> object:
        """A heat map of a figure, roles by layers; see ``SweepResult.plot``.

        Args:
            path: The file to write, .png, .svg, .pdf, .html or .txt; None prints to the terminal, or shows a view in a notebook.
            figure: See ``by_layer``.

        Returns:
            See ``SweepResult.plot``.

        Raises:
            InputError: For another figure or ending, and where the file cannot be written.
            RuntimeUnavailable: Where the package for the ending is not installed.
        """
        return self.by_layer(figure).plot(path)

    def view(self) -> Report:
        """What a notebook shows: the figures by role and layer as maps, and a table of all sites."""
        from graphlens.views.drift_view import drift

        return drift(self)

    def _repr_html_(self) -> str:
        from graphlens.views.pages import in_notebook

        return in_notebook(self)

    def __rich__(self) -> Table:
        return self.table()

    def table(self, n: int = MAX_ROWS, by: str | None = None) -> Table:
        """A table for a terminal, the worst sites first; those without fresh error are left out where it goes by that.

        Args:
            n: How many sites.
            by: See ``worst``.
        """
        from graphlens.views.drift_table import drift_table

        rows = self.worst(n, by)
        if by == "fresh" or (by is None and not self.patched):
            rows = [site for site in rows if site.fresh] or rows[:1]
        return drift_table(rows, len(self.sites), self.metric[0] if self.metric else None)

    # Files

    def to_dict(self) -> dict[str, object]:
        """All of it as what JSON can hold; infinite and undefined figures as "inf", "-inf" and "nan"."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.init and item.name != "sites"}
        sites = [{**asdict(site), "snr": site.snr} for site in self.sites]
        whole = {"format": FORMAT, "version": FORMAT_VERSION, **own, "sites": sites}
        return {name: _plain(value) for name, value in whole.items()}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a JSON file, whole or not at all.

        Args:
            path: Where; ".json" is added where it has no ending.

        Returns:
            The path written.

        Raises:
            InputError: Where it cannot be written.
        """
        target = user_path(path)
        target = target if target.suffix else target.with_name(f"{target.name}.json")
        try:
            with replacing(target) as made:
                made.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error}).") from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what ``save`` wrote.

        Args:
            path: The file.

        Raises:
            InputError: For a file that is missing, damaged, something else, or of a newer version.
        """
        source = user_path(path)
        source = source if source.suffix else source.with_name(f"{source.name}.json")
        try:
            record = json.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{source}: cannot be read ({error.strerror}).") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: damaged, it is no JSON ({error}).") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise InputError(f"{source}: this is not the result of a drift.")
        version = record.get("version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise InputError(
                f"{source}: version {version}, and this graphlens reads up to {FORMAT_VERSION}. Update it."
            )
        try:
            sites = tuple(_site(each) for each in record["sites"])
            metric = record["metric"]
            return cls(
                sites,
                float(record["logits"]),
                str(record["reference"]),
                str(record["other"]),
                tuple(map(str, record["only_reference"])),
                tuple(map(str, record["only_other"])),
                shape=(int(record["shape"][0]), int(record["shape"][1])),
                metric=None if metric is None else (str(metric[0]), float(metric[1]), float(metric[2])),
                notes=tuple(map(str, record["notes"])),
                end=str(record["end"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(
                f"{source}: damaged, its parts do not fit ({type(error).__name__}: {error}). Measure again."
            ) from error


def _layer(site: Drifted) -> str:
    """The label of a site's layer."""
    return OUTSIDE if site.layer is None else str(site.layer)


def _grid(cells: Mapping[tuple[str, str], float], axes: tuple[str, str], figure: str) -> SweepResult:
    """Figures by two labels as a SweepResult, infinite ones as they are."""
    rows, columns = (list(dict.fromkeys(key[at] for key in cells)) for at in (0, 1))
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in cells.items():
        values[rows.index(row), columns.index(column)] = value
    labels: dict[str, Sequence[str]] = dict(zip(axes, (rows, columns), strict=True))
    return SweepResult(values, axes, labels, metadata={"figure": figure})


def _plain(value: object) -> object:
    """A value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _site(record: Mapping[str, object]) -> Drifted:
    """A site as JSON held it."""

    def numbers(given: object) -> tuple[float, ...]:
        if not isinstance(given, list):
            raise TypeError(f"{given!r:.40} is no list")
        return tuple(float(item) for item in given)

    def share(given: object) -> float | None:
        return None if given is None else float(str(given))

    nodes = record["nodes"]
    if not isinstance(nodes, Iterable) or isinstance(nodes, str):
        raise TypeError(f"{nodes!r:.40} is no list")
    return Drifted(
        str(record["hook"]),
        float(str(record["relative"])),
        float(str(record["cosine"])),
        float(str(record["fresh"])),
        heads=numbers(record["heads"]),
        fresh_heads=numbers(record["fresh_heads"]),
        recovered=share(record["recovered"]),
        metric=share(record["metric"]),
        nodes=tuple(map(str, nodes)),
    )
