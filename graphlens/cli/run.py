"""Commands that run a model and show or keep what is inside: demo, hooks, cache, run, generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graphlens.cli.inputs import Images, masked_places, open_any, read_any
from graphlens.cli.options import (
    Bos,
    Ids,
    Json,
    Model,
    Prompt,
    Provider,
    Strict,
    Tokenizer,
    ensure_writable,
    open_model,
    print_json,
)
from graphlens.cli.token_text import text_of, texts_of, tokens_of
from graphlens.errors import InputError
from graphlens.file.folder import replacing

if TYPE_CHECKING:
    from graphlens.analysis.arrays import Array
    from graphlens.cli.inputs import Opened
    from graphlens.cli.options import Read
    from graphlens.edits.kinds import Ablate
    from graphlens.model.hooked_transformer import HookedTransformer

EMBEDDED = "tiny-gpt2"
_SHOWN = 8  # tokens at the end of a prompt that was cut


def demo(
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="tiny-gpt2 (the default), tiny-llama, or any hooked folder.")
    ] = EMBEDDED,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Run the indirect-object demonstration: read, lens, ablate, patch.

    Example: [bold]graphlens demo[/]
    """
    from dataclasses import asdict

    from rich.console import Console

    from graphlens.cli.demo import run_demo, show_demo

    figures = run_demo(open_model(model, provider))
    if as_json:
        print_json(asdict(figures))
    else:
        show_demo(figures, Console())


def hooks(model: Model, as_json: Json = False) -> None:
    """List every hook point of a model: name, shape, dtype.

    Example: [bold]graphlens hooks tiny-gpt2[/]
    """
    from rich.console import Console

    points = open_any(model).hook_points()
    if as_json:
        print_json({name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in points.items()})
    else:
        Console().print(points)


def cache(
    model: Model,
    prompt: Prompt,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="The .safetensors file to write.")],
    names: Annotated[
        str, typer.Option("--names", metavar="PATTERN", help="Which hook points, as a name or shell pattern.")
    ] = "*",
    ids: Ids = False,
    tokenizer: Tokenizer = None,
    bos: Bos = None,
    strict: Strict = False,
    provider: Provider = None,
) -> None:
    """Run a prompt and save its activations as safetensors.

    For a vision model PROMPT is a .npy file of images, [batch, channels, height, width].

    Example: [bold]graphlens cache tiny-gpt2 "Hello world" --names "*.hook_pattern" -o acts.safetensors[/]
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save, save_file

    from graphlens.file.hook_patterns import match_glob

    target = ensure_writable(out, "the activations")
    opened = open_any(model, provider, tokenizer)
    chosen = match_glob(list(opened.hook_dict), names)
    read = read_any(opened, "the prompt", prompt, bos, strict, ids)
    name, given = ("images", read.pixels) if isinstance(read, Images) else ("tokens", read.tokens)
    _, activations = opened.run_with_cache(given, names_filter=chosen, return_type=None)
    tensors = {name: given, **{name: np.ascontiguousarray(value) for name, value in activations.items()}}
    notes = {"prompt": prompt, "model": opened.cfg.model_name, "used": read.used}
    try:
        with replacing(target) as place:
            if place != target:
                save_file(tensors, place, metadata=notes)
            else:  # a pipe, say, which save_file would replace by a file
                target.write_bytes(save(tensors, metadata=notes))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target}: cannot be written ({error}).") from error
    size = sum(tensor.nbytes for tensor in tensors.values())
    typer.echo(f"{len(chosen)} activations of {read.used} -> {target} ({size / 1e6:.1f} MB)")


def run(
    model: Model,
    prompt: Prompt,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            "--ablate",
            metavar="HOOK[:HEAD]",
            help="A hook point, or one head of it, to set to zero; may be given several times.",
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many next tokens to show.")] = 5,
    ids: Ids = False,
    tokenizer: Tokenizer = None,
    bos: Bos = None,
    strict: Strict = False,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Show the most likely next tokens, and what ablating hook points changes.

    Of an encoder those in the place of each masked token; of a vision model, whose PROMPT is a .npy file of images, the most
    likely classes.

    Example: [bold]graphlens run tiny-gpt2 "When John and Mary met, John called" --ablate blocks.2.attn.hook_z:2[/]
    """
    import numpy as np

    edits = [_ablation(spec) for spec in ablate or []]
    opened = open_any(model, provider, tokenizer)
    read = read_any(opened, "the prompt", prompt, bos, strict, ids)
    given = read.pixels if isinstance(read, Images) else read.tokens
    places = _places(opened, read, prompt)
    plain = np.asarray(opened(given))
    edited = np.asarray(opened.run_with_interventions(given, edits)) if edits else plain
    if not isinstance(read, Images):  # one prompt, of whose positions some are shown
        plain, edited = plain[0], edited[0]
    found = {place: _likely(plain[place], edited[place], top) for place in places}
    if as_json:
        _print_numbers(opened, read, found, bool(edits))
    else:
        _print_tables(opened, places, found, bool(edits))


_Likely = list[tuple[int, float, float]]  # number, its probability, that after edits


def _places(opened: Opened, read: Read | Images, prompt: str) -> dict[int, str]:
    """Where logits are shown, and what stands above them: at the end, at masked tokens, of each image."""
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_vit import HookedViT

    if isinstance(read, Images):
        return {i: f"Classes of image {i}" for i in range(len(read.pixels))}
    if isinstance(opened, HookedEncoder):
        return {i: f"Masked token at position {i}" for i in masked_places(opened, read)}
    assert not isinstance(opened, HookedViT)
    if read.is_cut:
        return {-1: f"Next token after {read.used}, which end in {text_of(opened, read.tokens[0, -_SHOWN:])!r}"}
    return {-1: f"Next token after {prompt!r}"}


def _print_numbers(opened: Opened, read: Read | Images, found: dict[int, _Likely], with_edits: bool) -> None:
    """Prints what is likely as JSON."""
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_vit import HookedViT

    what = "class" if isinstance(read, Images) else "token"
    likely = {
        place: [
            {what: _name(opened, i), "probability": p, **({"ablated": q} if with_edits else {})} for i, p, q in rows
        ]
        for place, rows in found.items()
    }
    if isinstance(opened, HookedViT) or isinstance(read, Images):
        print_json({"images": len(likely), "classes": list(likely.values())})
        return
    head = {"tokens": texts_of(opened, read.tokens[0]), "of": read.length}
    if isinstance(opened, HookedEncoder):
        print_json({**head, "masked": [{"position": place, "likely": rows} for place, rows in likely.items()]})
    else:
        print_json({**head, "next": likely[-1]})


def _print_tables(opened: Opened, places: dict[int, str], found: dict[int, _Likely], with_edits: bool) -> None:
    """Prints what is likely for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    for place, title in places.items():
        table = Table(title=escape(title), title_justify="left")
        table.add_column("class" if title.startswith("Classes") else "token")
        for column in ("probability", *(["ablated", "change"] if with_edits else [])):
            table.add_column(column, justify="right")
        for i, p, q in found[place]:
            name = _name(opened, i)
            shown = escape(repr(name)) if isinstance(name, str) else str(name)
            table.add_row(shown, f"{p:.4f}", *([f"{q:.4f}", f"{q - p:+.4f}"] if with_edits else []))
        Console().print(table)


def _name(opened: Opened, number: int) -> str | int:
    """A token's text, or a class's number."""
    from graphlens.model.hooked_vit import HookedViT

    return number if isinstance(opened, HookedViT) else text_of(opened, [number])


def _likely(plain: Array, edited: Array, top: int) -> _Likely:
    """(number, its probability, that after edits) of the likeliest of logits [V], and of those that edits make likeliest."""
    import numpy as np

    from graphlens.analysis.numerics import softmax

    before, after = softmax(plain), softmax(edited)
    order = [int(i) for i in np.argsort(-before)[:top]]
    order += [int(i) for i in np.argsort(-after)[:top] if i not in order]
    return [(i, float(before[i]), float(after[i])) for i in order]


def _ablation(spec: str) -> Ablate:
    """The zero ablation that ``HOOK`` or ``HOOK:HEAD`` asks for."""
    from graphlens.edits.kinds import Ablate

    name, _, head = spec.partition(":")
    if head and not head.isdecimal():
        raise InputError(f"--ablate {spec!r}: after the colon comes a head's number, not {head!r}.")
    return Ablate(name, heads=int(head) if head else None)


def generate(
    model: Model,
    prompt: Prompt,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="How many tokens at most.")
    ] = 20,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", min=0, help="How much the draws vary; 0 takes the likeliest token."),
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="A number that makes the draws repeatable.")
    ] = None,
    ids: Ids = False,
    tokenizer: Tokenizer = None,
    bos: Bos = None,
    provider: Provider = None,
) -> None:
    """Continue a prompt, up to an end token: the tokenizer's, or one that the model's settings name.

    Example: [bold]graphlens generate tiny-gpt2 "When John and Mary went to the store," -n 12[/]
    """
    import numpy as np

    opened = open_model(model, provider, tokenizer)
    ends = _end_tokens(opened)
    cached = opened.runner.engine.manifest.keeps_past  # a file adopted without a KV cache runs the whole text each time
    if opened.tokenizer is None or ids:
        tokens = tokens_of(opened, "the prompt", prompt, bos, ids)
        found = opened.generate(
            tokens, max_new_tokens, temperature=temperature, seed=seed, stop_at_eos=bool(ends), eos_token_id=ends or None,
            use_past_kv_cache=cached, verbose=False,
        )  # fmt: skip
        typer.echo(text_of(opened, np.asarray(found)[0]))
        return
    text = opened.generate(
        prompt, max_new_tokens, temperature=temperature, prepend_bos=bos, seed=seed, stop_at_eos=bool(ends),
        eos_token_id=ends or None, use_past_kv_cache=cached,
    )  # fmt: skip
    typer.echo(text)


def _end_tokens(model: HookedTransformer) -> list[int]:
    """The ids that end a text: the tokenizer's, and those that the settings in the model's folder name."""
    from graphlens.file.end_tokens import end_tokens

    own = None if model.tokenizer is None else model.tokenizer.eos_token_id
    named = [id for id in end_tokens(model.runner.engine.folder) if id < model.cfg.d_vocab]
    return list(dict.fromkeys([*([] if own is None else [own]), *named]))
