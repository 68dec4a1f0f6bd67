"""``graphlens features``: a page about features of an SAE: where they are active, and which logits they raise."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from graphlens.cli.options import Model, Provider, Tokenizer, ensure_writable, open_model, say
from graphlens.cli.saes import sae_of
from graphlens.errors import InputError


def features(
    model: Model,
    sae: Annotated[
        str,
        typer.Argument(
            metavar="SAE", help="The SAE's folder, tiny-gpt2-saes/ITS_HOOK, or OWNER/NAME/FOLDER on the hub."
        ),
    ],
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="CORPUS", help="A file: .txt (a document a line), .jsonl, .parquet, .npy with token ids."
        ),
    ],
    feature: Annotated[
        list[int] | None,
        typer.Option(
            "--feature",
            metavar="N",
            min=0,
            help="Which feature; may be given again. Default: the ten that are above 0 most rarely, but at ten tokens.",
        ),
    ] = None,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="The .html file to write.")] = "features.html",
    top: Annotated[int, typer.Option("--top", metavar="K", min=1, help="How many examples of each.")] = 10,
    documents: Annotated[
        int, typer.Option("--documents", metavar="N", min=1, help="How many documents are read, from the first on.")
    ] = 500,
    hook: Annotated[
        str | None,
        typer.Option("--hook", metavar="NAME", help="The hook point that the SAE reads, where its files do not say."),
    ] = None,
    tokenizer: Tokenizer = None,
    provider: Provider = None,
) -> None:
    """Write one HTML page about features of an SAE: their activations, the tokens they are largest at, the logits they raise.

    The BOS token is left out. A document longer than the model takes is cut at its end.

    Example: [bold]graphlens features tiny-gpt2 tiny-gpt2-saes/blocks.2.hook_resid_post texts.txt --feature 59 -o features.html[/]
    """
    import numpy as np

    from graphlens.experiments.feature_search import feature_examples, feature_page
    from graphlens.file.corpora import documents as documents_of

    target = ensure_writable(out, "the page")
    opened = open_model(model, provider, tokenizer)
    found = sae_of(sae, hook)
    longest = opened.cfg.n_ctx
    rows = [
        opened.border.from_user(opened.to_tokens(each))[0, :longest] if isinstance(each, str) else each[:longest]
        for each in islice(documents_of(corpus), documents)
    ]
    rows = [row for row in rows if len(row)]
    if not rows:
        raise InputError(f"{corpus}: there is no document with a token in it.")
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, -len(row) :], mask[at, -len(row) :] = row, 1
    bos = getattr(opened.tokenizer, "bos_token_id", None)
    left_out = [] if bos is None else [int(bos)]
    chosen = feature
    if not chosen:
        every = feature_examples(opened, ids, found, k=1, exclude=left_out, attention_mask=mask)
        counts = every.density * len(every.tokens)
        often = np.flatnonzero(counts >= min(10, counts.max()))
        chosen = [int(each) for each in often[np.argsort(counts[often], kind="stable")][:10]]
    page = feature_page(opened, ids, found, chosen, k=top, exclude=left_out, attention_mask=mask)
    say(f"{len(rows):,} documents, {int(mask.sum()):,} tokens; features {', '.join(map(str, chosen))}.")
    typer.echo(f"Wrote {page.save(target)}.")
