"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphlens.cli.options import (
    Hooked,
    Json,
    KeepHooks,
    Layout,
    Model,
    NoBos,
    Out,
    Prompt,
    Provider,
    SelfContained,
    WithPast,
    open_model,
    print_json,
)
from graphlens.cli.patch import attribute, patch
from graphlens.errors import GraphlensError, InputError

if TYPE_CHECKING:
    from graphlens.edits.kinds import Ablate

app = typer.Typer(
    help="Transformers as ONNX files whose internals have names: export, read, edit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option("--model", help="Any hooked folder; default: the embedded model.")
    ] = None,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Run the indirect-object demonstration: read, lens, ablate, patch.

    Example: [bold]graphlens demo[/]
    """
    from dataclasses import asdict

    from rich.console import Console

    from graphlens.cli.demo import run_demo, show_demo
    from graphlens.pipelines.hub import embedded_model

    figures = run_demo(open_model(model or str(embedded_model()), provider))
    if as_json:
        print_json(asdict(figures))
    else:
        show_demo(figures, Console())


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A hub name (gpt2, distilgpt2, ...) or a checkpoint folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with transformers and try every hook point.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit on the hub.")] = None,
    with_past: WithPast = False,
    layout: Layout = "plain",
) -> None:
    """Export a Hugging Face checkpoint to a hooked folder (needs torch and transformers).

    With --with-past or --layout it becomes a file for other runtimes instead, without hooks: with a KV cache for
    onnxruntime-genai, or laid out for transformers.js (which wants both).

    Example: [bold]graphlens export gpt2 -o gpt2-hooked[/]
    """
    from graphlens.pipelines.export import cached_export, export_model, report_lines
    from graphlens.views.progress import spinner

    if with_past or layout != "plain":
        from graphlens.pipelines.deploy import bake_model

        if force or not verify:
            raise InputError(
                "--force and --no-verify are for a hooked export; leave them out with --with-past or --layout."
            )

        folder = cached_export(model, revision=revision)
        typer.echo(f"Wrote {bake_model(folder, [], out, with_past=with_past, layout=layout)}")
        return
    with spinner(f"Exporting {model}"):
        report = export_model(model, out, verify=verify, force=force, revision=revision, announce=typer.echo)
    for line in report_lines(report):
        typer.echo(line)


@app.command()
def hooks(model: Model, as_json: Json = False) -> None:
    """List every hook point of a model: name, shape, dtype.

    Example: [bold]graphlens hooks gpt2-hooked[/]
    """
    from rich.console import Console

    from graphlens.engine.engine import Engine
    from graphlens.model.hooked_transformer import HookedTransformer

    path = Path(model)
    opened = HookedTransformer(Engine(path)) if path.exists() and _is_hooked(path) else open_model(model)
    points = opened.hook_points()
    if as_json:
        print_json({name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in points.items()})
    else:
        Console().print(points)


def _is_hooked(path: Path) -> bool:
    return path.is_file() or (path / "model.onnx").is_file()


@app.command()
def cache(
    model: Model,
    prompt: Prompt,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .safetensors file to write.")],
    names: Annotated[str, typer.Option("--names", help="Which hook points, as a shell pattern.")] = "*",
    no_bos: NoBos = False,
    provider: Provider = None,
) -> None:
    """Run a prompt and save its activations as safetensors.

    Example: [bold]graphlens cache gpt2-hooked "Hello world" --names "*.hook_pattern" -o acts.safetensors[/]
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from graphlens.file.names import match_glob

    opened = open_model(model, provider)
    chosen = match_glob(list(opened.hook_dict), names)
    tokens = opened.to_tokens(prompt, prepend_bos=not no_bos)
    _, activations = opened.run_with_cache(tokens, names_filter=chosen, return_type=None)
    try:
        save_file(
            {"tokens": tokens, **{name: np.ascontiguousarray(value) for name, value in activations.items()}},
            out,
            metadata={"prompt": prompt, "model": opened.cfg.model_name},
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: cannot be written ({error}).") from error
    typer.echo(f"{len(chosen)} activations of {tokens.shape[1]} tokens -> {out} ({out.stat().st_size / 1e6:.1f} MB)")


@app.command()
def run(
    model: Model,
    prompt: Prompt,
    ablate: Annotated[
        list[str] | None,
        typer.Option("--ablate", help="HOOK or HOOK:HEAD to set to zero; may be given several times."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many next tokens to show.")] = 5,
    no_bos: NoBos = False,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Show the most likely next tokens, and what ablating hook points changes.

    Example: [bold]graphlens run gpt2-hooked "The capital of France is" --ablate blocks.5.attn.hook_z:7[/]
    """
    import numpy as np

    from graphlens.analysis.numerics import softmax

    opened = open_model(model, provider)
    tokens = opened.to_tokens(prompt, prepend_bos=not no_bos)
    edits = [_ablation(spec) for spec in ablate or []]
    plain = softmax(opened(tokens)[0, -1])
    edited = softmax(opened.run_with_interventions(tokens, edits)[0, -1]) if edits else plain
    order = np.argsort(-plain)[:top]
    extra = [i for i in np.argsort(-edited)[:top] if i not in order]
    rows = [(opened.to_string([int(i)]), float(plain[i]), float(edited[i])) for i in [*order, *extra]]
    if as_json:
        print_json([{"token": token, "probability": p, **({"ablated": q} if edits else {})} for token, p, q in rows])
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Next token after {escape(prompt)!r}", title_justify="left")
    for column in ("token", "probability", *(["ablated", "change"] if edits else [])):
        table.add_column(column, justify="left" if column == "token" else "right")
    for token, p, q in rows:
        table.add_row(escape(repr(token)), f"{p:.4f}", *([f"{q:.4f}", f"{q - p:+.4f}"] if edits else []))
    Console().print(table)


def _ablation(spec: str) -> Ablate:
    """``HOOK`` or ``HOOK:HEAD`` -> its zero ablation."""
    from graphlens.edits.kinds import Ablate

    name, _, head = spec.partition(":")
    if head and not head.isdigit():
        raise InputError(f"--ablate {spec!r}: after the colon comes a head's number, not {head!r}.")
    return Ablate(name, heads=int(head) if head else None)


app.command()(patch)
app.command()(attribute)


@app.command()
def generate(
    model: Model,
    prompt: Prompt,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="How many tokens at most.")] = 20,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes the draws repeatable.")] = None,
    no_bos: NoBos = False,
    provider: Provider = None,
) -> None:
    """Continue a prompt.

    Example: [bold]graphlens generate gpt2-hooked "Once upon a time" -n 40 --temperature 0.8[/]
    """
    opened = open_model(model, provider)
    text = opened.generate(prompt, max_new_tokens, temperature=temperature, prepend_bos=not no_bos, seed=seed)
    typer.echo(text)


@app.command()
def process(
    model: Annotated[Path, typer.Argument(help="A hooked folder or model.onnx with unprocessed float32 weights.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    fold_ln: Annotated[bool, typer.Option(help="Fold the norms' weights into what reads them.")] = True,
    center_writing_weights: Annotated[bool, typer.Option(help="Centre what writes to the residual stream.")] = True,
    center_unembed: Annotated[bool, typer.Option(help="Centre the logits over the vocabulary.")] = True,
    fold_value_biases: Annotated[bool, typer.Option(help="Move value biases into output biases.")] = True,
    refactor: Annotated[bool, typer.Option(help="Make each head's factors even by SVD.")] = False,
) -> None:
    """Process a hooked file's weights as TransformerLens does; predictions stay the same.

    Example: [bold]graphlens process gpt2-hooked -o gpt2-processed[/]
    """
    from graphlens.surgery import process_weights

    folder = process_weights(model, out, fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor)
    typer.echo(f"Wrote {folder}")


@app.command()
def bake(
    model: Hooked,
    edits: Annotated[Path, typer.Argument(help="Interventions as JSON (graphlens.edits.kinds.save writes it).")],
    out: Out,
    with_past: WithPast = False,
    keep_hooks: KeepHooks = False,
    self_contained: SelfContained = False,
    layout: Layout = "plain",
) -> None:
    """Write a model with interventions inside: a plain ONNX file that any ONNX Runtime runs.

    Example: [bold]graphlens bake gpt2-hooked edits.json -o gpt2-edited[/]
    """
    from graphlens.edits.files import load
    from graphlens.pipelines.deploy import bake_model

    folder = bake_model(
        model,
        load(edits),
        out,
        with_past=with_past,
        keep_hooks=keep_hooks,
        self_contained=self_contained,
        layout=layout,
    )
    typer.echo(f"Wrote {folder}")


@app.command()
def drivable(
    model: Hooked,
    gates: Annotated[list[str], typer.Option("--gates", help="Hook points, as names or shell patterns.")],
    out: Out,
    kinds: Annotated[
        str, typer.Option("--kinds", help="Which changes: scale, add, patch; with commas.")
    ] = "scale,add,patch",
    required_gates: Annotated[
        bool, typer.Option("--required-gates", help="Without defaults: JavaScript can't feed optional inputs.")
    ] = False,
    with_past: WithPast = False,
    keep_hooks: KeepHooks = False,
    self_contained: SelfContained = False,
) -> None:
    """Write a model whose hook points can be changed through inputs, from any ONNX Runtime language.

    Example: [bold]graphlens drivable gpt2-hooked --gates "blocks.*.attn.hook_z" -o gpt2-drivable[/]
    """
    from graphlens.pipelines.deploy import write_drivable

    names = write_drivable(
        model,
        gates,
        out,
        kinds=[kind.strip() for kind in kinds.split(",")],
        required=required_gates,
        with_past=with_past,
        keep_hooks=keep_hooks,
        self_contained=self_contained,
    )
    typer.echo(f"Wrote {out}: {len(names)} gates, the inputs <hook>/" + ", <hook>/".join(_parts(kinds)))


def _parts(kinds: str) -> list[str]:
    from graphlens.edits.gate import PARTS

    return [part for kind in kinds.split(",") for part in PARTS[kind.strip()].inputs]


@app.command()
def strip(model: Hooked, out: Out, self_contained: SelfContained = False) -> None:
    """Write the plain model of a hooked or drivable file: no hook points as outputs, no gates.

    Example: [bold]graphlens strip gpt2-drivable -o gpt2-plain[/]
    """
    from graphlens.pipelines.deploy import write_stripped

    typer.echo(f"Wrote {write_stripped(model, out, self_contained=self_contained)}")


@app.command()
def check(model: Annotated[Path, typer.Argument(help="A hooked folder or model.onnx.")]) -> None:
    """Check a file from a stranger: what it contains, and every byte of its weights.

    Example: [bold]graphlens check gpt2-hooked[/]
    """
    from graphlens.surgery import check as check_file

    report = check_file(model)
    typer.echo(
        f"{model}: safe to open. {report.nodes:,} nodes, {report.external_bytes / 1e6:,.1f} MB of weights in "
        f"{', '.join(report.external_files) or 'the file itself'}; fingerprints match."
    )


@app.command("cache-clear")
def cache_clear() -> None:
    """Delete what is in the cache folder (GRAPHLENS_CACHE): the exports that from_pretrained made, and packed weights.

    Example: [bold]graphlens cache-clear[/]
    """
    import shutil

    from graphlens.file.folder import cache_root

    for name, remark in (("hooked", " (hardlinked weights free nothing while the original stays)"), ("packed", "")):
        folder = cache_root() / name
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
        shutil.rmtree(folder, ignore_errors=True)
        typer.echo(f"{folder}: removed {size / 1e6:,.1f} MB{remark}.")


def main() -> None:
    """The entry point: errors of ours are one readable block on stderr and exit code 1; wrong usage exits with 2."""
    try:
        app()
    except GraphlensError as error:
        from rich.console import Console
        from rich.markup import escape
        from rich.panel import Panel

        title = type(error).__name__
        Console(stderr=True).print(Panel(escape(str(error)), title=title, title_align="left", border_style="red"))
        sys.exit(1)


if __name__ == "__main__":
    main()
