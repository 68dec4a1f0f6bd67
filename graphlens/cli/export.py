"""Commands that make hooked folders: export, process, and cache-clear, which removes those that were kept."""

from __future__ import annotations

from typing import Annotated

import typer

from graphlens.cli.options import Hooked, Layout, Link, Out, WithPast, ensure_new_folder, flag, place_of
from graphlens.errors import InputError


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A hub name (gpt2, distilgpt2, ...), a checkpoint folder, tiny-gpt2 or tiny-llama."
        ),
    ],
    out: Out,
    verify: Annotated[
        bool, flag("--verify/--no-verify", help="Compare with transformers and try every hook point.")
    ] = True,
    force: Annotated[bool, flag("--force", help="Replace an existing export.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="A branch, tag or commit on the hub.")] = None,
    n_ctx: Annotated[
        int | None,
        typer.Option("--n-ctx", metavar="N", min=1, help="The most tokens that a run takes; default: at most 2048."),
    ] = None,
    with_past: WithPast = False,
    layout: Layout = "plain",
    link: Link = False,
) -> None:
    """Export a Hugging Face checkpoint to a hooked folder (needs torch and transformers).

    With --with-past or --layout it becomes a file for other runtimes instead, without hooks: with a KV cache for
    onnxruntime-genai, or laid out for transformers.js (which wants both).

    Example: [bold]graphlens export gpt2 -o gpt2-hooked[/]
    """
    from graphlens.pipelines.cache import cached_export
    from graphlens.pipelines.export import export_model, report_lines
    from graphlens.views.progress import spinner

    if with_past or layout != "plain":
        from graphlens.pipelines.deploy import bake_model

        if force or not verify or n_ctx is not None:
            raise InputError(
                "--force, --no-verify and --n-ctx are for a hooked export; leave them out with --with-past or --layout."
            )
        ensure_new_folder(out)
        folder = cached_export(model, revision=revision)
        made = bake_model(folder, [], out, with_past=with_past, layout=layout, link=link, announce=typer.echo)
        typer.echo(f"Wrote {made}")
        return
    with spinner(f"Exporting {model}"):
        report = export_model(
            model, out, verify=verify, force=force, revision=revision, announce=typer.echo, link=link, n_ctx=n_ctx
        )
    for line in report_lines(report):
        typer.echo(line)


def process(
    model: Hooked,
    out: Out,
    fold_ln: Annotated[bool, flag(help="Fold the norms' weights into what reads them.")] = True,
    center_writing_weights: Annotated[bool, flag(help="Centre what writes to the residual stream.")] = True,
    center_unembed: Annotated[bool, flag(help="Centre the logits over the vocabulary.")] = True,
    fold_value_biases: Annotated[bool, flag(help="Move value biases into output biases.")] = True,
    refactor: Annotated[bool, flag(help="Make each head's factors even by SVD.")] = False,
) -> None:
    """Process a hooked file's weights as TransformerLens does; predictions stay the same. It needs float32 weights.

    Example: [bold]graphlens process tiny-gpt2 -o processed[/]
    """
    from graphlens.file.leftovers import size_of
    from graphlens.surgery import process_weights
    from graphlens.views.progress import note

    folder = process_weights(
        place_of(model),
        out,
        fold_ln,
        center_writing_weights,
        center_unembed,
        fold_value_biases,
        refactor,
        announce=note,
    )
    typer.echo(f"Wrote {folder}: {size_of(folder) / 1e6:,.1f} MB written")


def cache_clear() -> None:
    """Delete what is in the cache folder (GRAPHLENS_CACHE): exports that from_pretrained made, packed weights, digests,
    the programs of live pages, and files fetched from URLs.

    Example: [bold]graphlens cache-clear[/]
    """
    from graphlens.file.folder import cache_root
    from graphlens.file.leftovers import clear

    hardlinked = " (hardlinked weights free nothing while the original stays)"
    for name, remark in (("hooked", hardlinked), ("packed", ""), ("digests", ""), ("npm", ""), ("remote", "")):
        folder = cache_root() / name
        typer.echo(f"{folder}: removed {clear(folder) / 1e6:,.1f} MB{remark}.")
