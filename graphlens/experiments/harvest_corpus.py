"""A corpus on its way into a harvest: read once, as token ids in the harvest's folder, with its digest."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from graphlens.analysis.arrays import ArrayT
from graphlens.errors import InputError, InputTypeError
from graphlens.file.corpora import Corpus, Document, documents
from graphlens.file.folder import writing
from graphlens.file.harvest_files import read_corpus, write_corpus
from graphlens.file.harvest_folder import HarvestFolder
from graphlens.file.harvest_layout import Ints, Laid, Layout
from graphlens.file.manifest import Json

if TYPE_CHECKING:
    from graphlens.model.runner import Runner

Kind = Literal["text", "ids"]


@dataclass(frozen=True)
class Options:
    """What a user asks of the rows of a harvest; None where they did not say.

    Attributes:
        context: See ``harvest``, as for the others.
        prepend_bos: See there.
    """

    context: int | None
    prepend_bos: bool | None

    def layout(self, layout: Layout, runner: Runner[ArrayT], kind: Kind) -> Layout:
        """The layout with what depends on the model and on whether the corpus is text.

        Args:
            layout: The rest.
            runner: The model.
            kind: What the corpus holds.

        Raises:
            InputError: A BOS or PAD token is needed and there is none, or rows are too short for one token.
        """
        config, tokenizer = runner.config, runner.text.tokenizer
        if kind == "text":
            runner.text.need_tokenizer()
        wanted = (
            self.prepend_bos if self.prepend_bos is not None else (kind == "text" and runner.text.default_prepend_bos)
        )
        bos = runner.text.need_tokenizer().require_bos() if wanted else None
        own_bos = None if tokenizer is None else tokenizer.bos_token_id
        pad = None if tokenizer is None else tokenizer.pad_token_id
        if layout.keep_pad and (pad is None or pad >= config.d_vocab):
            raise InputError(
                "keep_pad needs a PAD token, and this model's tokenizer has none. Leave it out, or use pack=True."
            )
        context = config.n_ctx if self.context is None else self.context
        if context <= (bos is not None):
            raise InputError(f"context={context}: a row must hold a token besides BOS. Pass 2 or more.")
        pad = pad if pad is not None and pad < config.d_vocab else 0  # of no consequence where it is not kept
        return replace(layout, context=context, bos=bos, own_bos=own_bos, pad=pad)


def _kind(document: Document) -> Kind:
    return "text" if isinstance(document, str) else "ids"


def _hashed(found: Iterator[Document], update: Callable[[bytes], None]) -> Iterator[Document]:
    """The documents as they are, counted into a digest; text and ids cannot be mixed."""
    first: Kind | None = None
    for number, document in enumerate(found):
        first = first or _kind(document)
        # An empty row of ids may stand among texts, where a dataset has no value.
        if _kind(document) != first:
            raise InputTypeError(
                f"document {number} is {_kind(document)}, and those before it are {first}: pass one kind."
            )
        data = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document.tobytes()
        update(f"{first} {len(data)};".encode() + data)
        yield document


def digest_of_corpus(corpus: Corpus, column: str | None) -> tuple[str, int, Kind]:
    """What tells a corpus from others, without making tokens of it.

    Args:
        corpus: See ``documents``.
        column: See there.

    Returns:
        (its digest, how many documents it has, what they are).

    Raises:
        InputError: See ``documents``; for a corpus without documents too.
    """
    digest, count, kind = hashlib.sha256(), 0, None
    for document in _hashed(documents(corpus, column), digest.update):
        kind, count = kind or _kind(document), count + 1
    if kind is None:
        raise InputError("the corpus is empty: it holds no document.")
    return digest.hexdigest(), count, kind


def take_in(
    folder: HarvestFolder, corpus: Corpus, column: str | None, runner: Runner[ArrayT], layout: Layout, options: Options
) -> tuple[Laid, dict[str, Json]]:
    """Reads a corpus into a harvest's folder, as token ids laid out in rows.

    Args:
        folder: The folder.
        corpus: See ``documents``.
        column: See there.
        runner: The model, whose tokenizer makes ids of text.
        layout: How rows are laid out, as far as that depends on neither model nor corpus.
        options: The rest.

    Returns:
        (the corpus laid out, what the plan says of it).

    Raises:
        InputError: See ``documents``; for a corpus without a token; and ids outside the vocabulary.
        ExportError: It cannot be written.
    """
    digest, lengths, kind = hashlib.sha256(), array("q"), None
    with folder.beside("ids") as raw, writing(raw):
        with raw.open("xb") as file:
            for document in _hashed(documents(corpus, column), digest.update):
                if kind is None:
                    kind = _kind(document)
                    layout = options.layout(layout, runner, kind)
                ids = _ids(document, len(lengths), runner)
                lengths.append(len(ids))
                file.write(ids.astype(np.int32).tobytes())
        sizes: Ints = np.asarray(lengths, np.int64)
        total = int(sizes.sum())
        if kind is None or not total:
            raise InputError(f"the corpus is empty: its {len(lengths)} documents hold no token.")
        segments, rows = layout.rows(sizes)
        written = write_corpus(folder, np.memmap(raw, np.int32, "r"), segments, rows, sizes)
    said: dict[str, Json] = {
        "digest": digest.hexdigest(),
        "kind": kind,
        "documents": len(lengths),
        "empty": int((sizes == 0).sum()),
        "tokens": total,
        "file": written,
    }
    return read_corpus(folder, layout, written), said


def _ids(document: Document, number: int, runner: Runner[ArrayT]) -> Ints:
    """The token ids of a document, without BOS."""
    try:
        if isinstance(document, str):
            return np.asarray(runner.text.encode(document, False, truncate=False), np.int64)
        return runner.text.token_ids(document)
    except InputError as error:
        raise InputError(f"document {number} of the corpus: {error}") from error
