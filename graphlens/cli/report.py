"""``graphlens report``: what a model does with a prompt, as one page to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from graphlens.cli.inputs import Images, likely, masked_places, open_any, read_any
from graphlens.cli.options import (
    Bos,
    Ids,
    Model,
    Provider,
    Read,
    Strict,
    Tokenizer,
    ensure_writable,
    say,
)
from graphlens.cli.token_text import answer_of, text_of, texts_of
from graphlens.cli.words import in_words_of_commands
from graphlens.errors import GraphlensError, InputError
from graphlens.file.folder import user_path

if TYPE_CHECKING:
    from graphlens.analysis.cache.activation_cache import ActivationCache
    from graphlens.analysis.metrics import LogitDiff
    from graphlens.cli.inputs import Opened
    from graphlens.cli.token_text import TextModel
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.views.pages import Report, View

_MOST = 64  # positions of attention and lens: a page of more is slow to read and to open
_WEIGHTS = 2_000_000  # of attention
_LIKELY = 5  # tokens or classes that are named


def report(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]", help="The text to run; for a model without tokenizer, or with --ids: '0 5 6 7'."
        ),
    ] = None,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="The .html file to write.")] = "report.html",
    clean: Annotated[
        str | None,
        typer.Option("--clean", metavar="TEXT", help="In place of PROMPT: whose activations are put into --corrupted."),
    ] = None,
    corrupted: Annotated[
        str | None,
        typer.Option("--corrupted", metavar="TEXT", help="A prompt of as many tokens that calls for another answer."),
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", metavar="TOKEN", help='The answer, one token: " Mary".')
    ] = None,
    wrong: Annotated[
        str | None, typer.Option("--wrong", metavar="TOKEN", help='The answer that --corrupted calls for: " John".')
    ] = None,
    ids: Ids = False,
    tokenizer: Tokenizer = None,
    bos: Bos = None,
    strict: Strict = False,
    provider: Provider = None,
) -> None:
    """Write one HTML page about a prompt: attention, logit lens, loss; with a second prompt also what patching restores.

    The page needs no network and no other file. With --answer and --wrong it says what each component writes to their
    difference; with --clean and --corrupted besides, it shows what each patch restores, and the edges of the circuit.

    An encoder is asked for its masked tokens, an answer for the one that the prompt has. For a vision model PROMPT is a .npy file
    of one image; the page shows its attention and its classes.

    Example: [bold]graphlens report tiny-gpt2 "The capital of France is" -o report.html[/]
    """
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_vit import HookedViT

    if (prompt is None) == (clean is None):
        raise InputError("give one prompt: as PROMPT, or as --clean with --corrupted.")
    if (clean is None) != (corrupted is None):
        raise InputError("--clean and --corrupted go together: one prompt's activations are put into the other's run.")
    if wrong is not None and answer is None:
        raise InputError("--wrong needs --answer: the difference of their logits is what is measured.")
    if corrupted is not None and (answer is None or wrong is None):
        raise InputError(
            "--clean and --corrupted need --answer and --wrong: the difference of their logits is what is measured."
        )
    target = user_path(out)
    if target.suffix.lower() not in ("", ".html", ".htm"):
        raise InputError(f"--out {out}: a page ends in .html.")
    ensure_writable(out, "the views")
    opened = open_any(model, provider, tokenizer)
    name, text = ("the prompt", prompt) if prompt is not None else ("--clean", clean or "")
    read = read_any(opened, name, text or "", bos, strict, ids)
    other = None if corrupted is None else read_any(opened, "--corrupted", corrupted, bos, strict, ids)
    if isinstance(read, Images) or isinstance(other, Images):
        if answer is not None or other is not None or len(read.pixels if isinstance(read, Images) else ()) != 1:
            raise InputError(
                f"{opened.cfg.model_name} is a vision model: its report is of one image, without --answer and second prompt."
            )
        _write(made(opened, read, title=_titled(text or "")), read, target)
        return
    assert not isinstance(opened, HookedViT)
    if other is not None and other.length != read.length:
        raise InputError(
            f"the clean prompt has {read.length} tokens and the corrupted one {other.length}: patching needs them position by "
            "position. Reword one of them."
        )
    right = None if answer is None else _token(opened, "--answer", answer, ids)
    other_answer = None if wrong is None else _token(opened, "--wrong", wrong, ids)
    place = -1 if right is None or not isinstance(opened, HookedEncoder) else _masked_place(opened, read, other)
    metric = None
    if right is not None and other_answer is not None:
        from graphlens.analysis.metrics import LogitDiff

        metric = LogitDiff(right, other_answer, position=place)
    _write(made(opened, read, other, right, metric, _titled(text or "")), read, target)


def _write(page: Report, read: Read | Images, target: Path) -> None:
    """Writes the page, and says so."""
    written = page.save(target)
    typer.echo(f"{len(page.views)} views of {read.used} -> {written} ({written.stat().st_size / 1e6:.2f} MB)")


def _masked_place(model: HookedEncoder, read: Read, other: Read | None) -> int:
    """The position of the one masked token. Raises InputError for several, and for another in the corrupted prompt."""
    places = [masked_places(model, each) for each in (read, other) if each is not None]
    if any(len(each) != 1 or each != places[0] for each in places):
        raise InputError(
            f"--answer is of one masked token, at one position in each prompt, and they are at {', '.join(map(str, places))}."
        )
    return places[0][0]


def made(
    model: Opened,
    read: Read | Images,
    corrupted: Read | None = None,
    answer: int | None = None,
    metric: LogitDiff | None = None,
    title: str = "graphlens report",
) -> Report:
    """The page of a prompt, or of a pair.

    Args:
        model: The model.
        read: The prompt, or the clean one of a pair; of a vision model one image.
        corrupted: The corrupted one.
        answer: The token in question at the end of the prompt.
        metric: The difference of two answers' logits.
        title: The page's title.
    """
    from graphlens.model.hooked_vit import HookedViT
    from graphlens.views import pages

    found: list[View | str] = []
    if isinstance(read, Images):
        asked = _seeing(model, read, found)
    else:
        assert not isinstance(model, HookedViT)
        _, cache = model.run_with_cache(read.tokens, return_type=None)
        asked = _reading(model, read, cache, answer, found)
        if metric is not None:
            asked += _attributing(model, read, corrupted, cache, metric)
    for what, job in asked:
        try:
            found.append(job())
        except GraphlensError as error:  # what one view needs may be missing in a model that others can be made of
            why = in_words_of_commands(str(error))
            found.append(f"{what}: not shown. {why}")
            say(f"Note: {what} is not in the page: {why}")
    cfg = model.cfg
    lead = [
        f"{cfg.model_name}: {cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}; {read.used}, "
        f"computed by ONNX Runtime ({', '.join(model.providers)}).",
    ]
    return pages.report(found, title, lead)


_Jobs = list[tuple[str, "Callable[[], View]"]]


def _seeing(model: Opened, read: Images, found: list[View | str]) -> _Jobs:
    """The views of an image; its classes are said in words."""
    import numpy as np

    from graphlens import views

    logits, cache = model.run_with_cache(read.pixels)
    shown = ", ".join(f"{number} ({p:.3f})" for number, p in likely(np.asarray(logits)[0], _LIKELY))
    found.append(f"Likeliest classes: {shown}.")
    length = cache["pattern", 0].shape[-1]
    most = _shown_positions(model, length)
    said = "" if most == length else f" (the first {most} of {length} positions)"
    words = ["class", *(f"patch {i}" for i in range(1, length))]
    title = f"Attention between patches{said}"
    return [("Attention", lambda: views.attention(cache, words, positions=slice(0, most), title=title))]


def _shown_positions(model: Opened, length: int) -> int:
    """How many positions of attention a page shows."""
    cfg = model.cfg
    fits = int((_WEIGHTS / max(1, cfg.n_layers * cfg.n_heads)) ** 0.5)
    return min(length, max(8, min(_MOST, fits)))


def _filling(model: HookedEncoder, read: Read, found: list[View | str]) -> None:
    """Says what an encoder puts in the place of each masked token, where there are any."""
    import numpy as np

    try:
        places = masked_places(model, read)
    except InputError as error:
        found.append(f"Masked tokens: not shown. {error}")
        return
    logits = np.asarray(model.forward(read.tokens))[0]
    for place in places:
        shown = ", ".join(f"{text_of(model, [number])!r} ({p:.3f})" for number, p in likely(logits[place], _LIKELY))
        found.append(f"Masked token at position {place}: {shown}.")


def _reading(
    model: TextModel, read: Read, cache: ActivationCache, answer: int | None, found: list[View | str]
) -> _Jobs:
    """The views of one run."""
    import numpy as np

    from graphlens import views
    from graphlens.model.hooked_encoder import HookedEncoder

    tokens, length = read.tokens[0], int(read.tokens.shape[1])
    most = _shown_positions(model, length)
    last = None if most == length else slice(-most, None)
    said = "" if last is None else f" (the last {most} of {length} positions)"

    def attention() -> View:
        return views.attention(cache, tokens, positions=last, title=f"Attention{said}")

    if isinstance(model, HookedEncoder):
        _filling(model, read, found)
        # No token comes next, so no token is in question at a position.
        lens = lambda: views.lens(cache, texts_of(model, tokens), positions=last, title=f"Logit lens{said}")  # noqa: E731
        return [("Attention", attention), ("Logit lens", lens)]

    def loss() -> View:
        values = model.forward(read.tokens, return_type="loss", loss_per_token=True)
        return views.text(
            tokens,
            {"loss (nats)": np.asarray(values)[0]},
            model=model,
            title="Text by loss",
            says="How surprising each token is to the model: -ln of the probability that it gave that token; the first has none.",
        )

    jobs: _Jobs = [
        ("Attention", attention),
        ("Logit lens", lambda: views.lens(cache, tokens, answer=answer, positions=last, title=f"Logit lens{said}")),
    ]
    return [*jobs, ("Text by loss", loss)] if length > 1 else jobs


def _attributing(
    opened: TextModel, read: Read, corrupted: Read | None, cache: ActivationCache, metric: LogitDiff
) -> _Jobs:
    """The views of a difference of two answers, and of a pair of prompts."""
    from graphlens import views
    from graphlens.experiments.act_patch import act_patch_sites
    from graphlens.experiments.attribution import attribution_patch, direct_logit_attribution
    from graphlens.experiments.circuits import edge_attribution
    from graphlens.experiments.sweep import sweep

    model = cast(
        "HookedTransformer", opened
    )  # an encoder is swept too, and what cannot be done of it is refused in words

    def direct() -> View:
        centred = "centred and " if model.runner.config.norm_centres("ln_final") else ""  # RMS norms centre nothing
        says = (
            f"What each component writes to the difference of the two answers' logits directly: its output, {centred}divided by "
            "the final norm's scale, times the norm's weight and the difference of their columns of W_U (Elhage et al. 2021).",
        )
        found = direct_logit_attribution(model, read.tokens, metric)
        return views.bars(found, name=f"logits of {metric.name}", says=says)

    jobs: _Jobs = [("Direct logit attribution", direct)]
    if corrupted is None:
        return jobs
    words = texts_of(model, corrupted.tokens[0])
    labels = {"pos": [f"{text}_{i}" for i, text in enumerate(words)]}
    clean, base = (float(metric(model(each.tokens))) for each in (read, corrupted))
    says = (
        f"One activation of the clean prompt at a time is put into the corrupted prompt's run. 0 is the corrupted prompt "
        f"({metric.name} {base:.5g}), 1 the clean one ({clean:.5g}).",
    )

    def swept(name: str, title: str, estimate: bool = False) -> View:
        sites = act_patch_sites(model, corrupted.tokens, name, labels)
        by = attribution_patch if estimate else sweep
        if clean == base:
            raise InputError(f"both prompts have the same {metric.name}, {clean:.5g}, so there is nothing to restore.")
        found = by(model, corrupted.tokens, sites, cache, metric.normalised(clean, base))
        more = ("Estimated from one gradient (attribution patching), not run.",) if estimate else ()
        return views.heat(found, name="share restored", title=title, says=(*says, *more))

    def edges() -> View:
        found = edge_attribution(model, corrupted.tokens, cache, metric)
        more = "What patching each edge alone would add to the metric, estimated from one gradient (Syed et al. 2023)."
        return views.circuit(found, name=f"logits of {metric.name}", title="Circuit", says=(more,))

    return [
        *jobs,
        ("Patching the residual stream", lambda: swept("resid_pre", "Patching: residual stream before each block")),
        ("Patching heads", lambda: swept("attn_head_out_all_pos", "Patching: each head's output, all positions")),
        (
            "Attribution of heads",
            lambda: swept("attn_head_out_by_pos", "Attribution: heads by position", estimate=True),
        ),
        ("Circuit", edges),
    ]


def _token(model: TextModel, option: str, given: str, ids: bool) -> int:
    """The id of an answer. Raises InputError for what is no token of the model."""
    found = answer_of(model, option, given, ids)
    token = model.to_single_token(found) if isinstance(found, str) else found
    if not 0 <= token < model.cfg.d_vocab_out:
        raise InputError(f"{option} {given}: token ids of {model.cfg.model_name} are 0 to {model.cfg.d_vocab_out - 1}.")
    return token


def _titled(text: str) -> str:
    """A prompt as a title: its beginning and its end."""
    return text if len(text) <= 160 else f"{text[:100]} … {text[-50:]}"
