"""What adopting found, in lines of text for people and as data for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from graphlens.file.names import split_name

if TYPE_CHECKING:
    from graphlens.file.manifest import Json
    from graphlens.pipelines.adopt import AdoptReport

_SHOWN = 8  # reasons that are printed in full


def report_lines(report: AdoptReport) -> list[str]:
    """What was found, in lines of text for people.

    Args:
        report: What ``adopt`` gave.
    """
    config, adopted = report.config, report.adopted
    kind = "vision transformer" if config.is_vision else "encoder" if config.is_encoder else "decoder"
    heads = f"{config.n_heads} heads"
    if config.n_key_value_heads != config.n_heads:
        heads += f" ({config.n_key_value_heads} of keys and values)"
    past = " and past" if any(name.startswith("past") for name in adopted.inputs) else ""
    lines = [
        f"{report.original.name}, written by {adopted.producer}: a {kind} of {config.n_layers} layers, {heads} of "
        f"{config.d_head}, d_model {config.d_model}, d_mlp {config.d_mlp}, d_vocab {config.d_vocab}, n_ctx {config.n_ctx}",
        f"Hook points: {len(report.hooks)} found, as {', '.join(_kinds(report.hooks))}",
        f"Weights: {len(report.weights)} found",
        f"Identities between hook points, on probes with padding{past}: {adopted.identities} hold, to {adopted.worst:.1e}",
    ]
    if adopted.expanded:
        lines.append(f"Expanded: {', '.join(f'{count} {name}' for name, count in adopted.expanded.items())}")
    lines += [f"Kept: {why}" for why in adopted.kept.values()]
    lines += _missing(adopted.missing)
    lines += [*adopted.notes, *report.remarks]
    if report.folder is None:
        lines.append("Nothing was written (--dry-run)")
    else:
        lines.append(f"Wrote {report.folder}. The original is as it was.")
    return lines


def _kinds(hooks: Iterable[str]) -> list[str]:
    """Hook points by their names without the block, each once."""
    return list(dict.fromkeys(split_name(name)[1] for name in hooks))


def _missing(missing: Mapping[str, str]) -> list[str]:
    """Which hook points are missing, and why; those of several blocks for one reason in one line."""
    by_reason: dict[tuple[str, str], list[int]] = {}
    for name, why in missing.items():
        layer, rest = split_name(name)
        by_reason.setdefault((rest, why if layer is None else why.replace(f"block {layer}", "block N")), []).append(
            -1 if layer is None else layer
        )
    lines = []
    for (rest, why), layers in list(by_reason.items())[:_SHOWN]:
        where = "" if layers == [-1] else f" in {len(layers)} block{'s' if len(layers) > 1 else ''}"
        lines.append(f"Missing: {rest}{where}: {why}")
    more = len(by_reason) - _SHOWN
    return [*lines, *([f"Missing: {more} more kinds of hook points; --json names all"] if more > 0 else [])]


def report_data(report: AdoptReport) -> dict[str, Json]:
    """The same as data.

    Args:
        report: What ``adopt`` gave.
    """
    adopted = report.adopted
    return {
        "original": str(report.original),
        "sha256": adopted.sha256,
        "data": dict(adopted.data),
        "producer": adopted.producer,
        "folder": None if report.folder is None else str(report.folder),
        "hooks": list(report.hooks),
        "weights": list(report.weights),
        "expanded": dict(adopted.expanded),
        "kept": dict(adopted.kept),
        "missing": dict(adopted.missing),
        "identities": dict(report.identities),
        "notes": [*adopted.notes, *report.remarks],
    }
