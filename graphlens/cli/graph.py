"""``graphlens graph``: which features of transcoders make a prediction, as JSON for Neuronpedia or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphlens.cli.options import (
    Bos,
    Ids,
    Model,
    Prompt,
    Provider,
    Strict,
    Tokenizer,
    ensure_writable,
    open_model,
    read_text,
)
from graphlens.cli.saes import sae_of
from graphlens.errors import InputError
from graphlens.file.embedded import CARD, SAES, embedded_folder
from graphlens.file.folder import user_path

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae

_WEIGHTS = (".safetensors", ".npz", ".pt")  # a folder with such a file is one SAE's


def graph(
    model: Model,
    prompt: Prompt,
    sae: Annotated[
        list[str],
        typer.Option(
            "--sae",
            metavar="SAE",
            help="A transcoder: its folder, or OWNER/NAME/FOLDER on the hub; or a folder of several, or tiny-gpt2-saes. "
            "Several times for several.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option("-o", "--out", metavar="FILE", help="A .html file to look at, or a .json file for Neuronpedia."),
    ] = "graph.html",
    node_threshold: Annotated[
        float, typer.Option("--node-threshold", metavar="SHARE", help="The share of the influence that the nodes keep.")
    ] = 0.8,
    edge_threshold: Annotated[
        float, typer.Option("--edge-threshold", metavar="SHARE", help="The same of the edges between them.")
    ] = 0.98,
    max_features: Annotated[
        int,
        typer.Option("--max-features", metavar="N", help="How many features are looked at, those of most influence."),
    ] = 5000,
    ids: Ids = False,
    tokenizer: Tokenizer = None,
    bos: Bos = None,
    strict: Strict = False,
    provider: Provider = None,
) -> None:
    """Find which features of transcoders make the next token, and how they act on one another: an attribution graph.

    Every MLP needs a transcoder. Attention patterns and norms are held as they are in the run.

    Example: [bold]graphlens graph tiny-gpt2 "When John and Mary went to the" --sae tiny-gpt2-saes -o graph.html[/]
    """
    from graphlens.experiments.attribution_graph import attribution_graph

    target = user_path(out)
    if target.suffix.lower() not in (".json", ".html", ".htm"):
        raise InputError(f"--out {out}: an attribution graph ends in .html, to look at, or in .json, for Neuronpedia.")
    ensure_writable(out, "the attribution graph")
    opened = open_model(model, provider, tokenizer)
    read = read_text(opened, "the prompt", prompt, bos, strict, ids)
    found = attribution_graph(opened, _saes(sae), read.tokens, max_features=max_features)
    pruned = found.prune(node_threshold, edge_threshold)
    written = pruned.to_json(target) if target.suffix.lower() == ".json" else pruned.page(target)
    typer.echo(f"{len(pruned.nodes):,} of {len(found.nodes):,} nodes of {read.used} -> {written}")


def _saes(names: list[str]) -> list[Sae]:
    """The SAEs that a user names: each name is one SAE's (see ``saes.sae_of``), or that of a folder of several."""
    from graphlens.edits.sae import Sae

    found: list[Sae] = []
    for name in names:
        folder = embedded_folder(name, CARD) if name in SAES else user_path(name)
        inner = sorted(each for each in folder.iterdir() if each.is_dir() and _is_sae(each)) if folder.is_dir() else []
        if not inner or _is_sae(folder):
            found.append(sae_of(name))
        else:  # others in such a folder are of the residual stream
            found += [each for each in map(Sae.from_folder, inner) if each.cfg.is_transcoder]
    return found


def _is_sae(folder: Path) -> bool:
    return any(each.suffix in _WEIGHTS for each in folder.iterdir())
