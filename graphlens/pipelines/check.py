"""Checking a folder from a stranger: each thing that is looked at, and in words what was and what was not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from graphlens.engine import packed_weights
from graphlens.file.folder import model_path
from graphlens.file.tokenizer import MERGES_FILE, TOKENIZER_FILE, VOCAB_FILE
from graphlens.file.tokenizer_check import check_tokenizer, read_checked
from graphlens.pipelines.trial import SECONDS, Trial, try_out
from graphlens.surgery.files import check
from graphlens.surgery.untrusted import CheckReport


@dataclass(frozen=True)
class Checked:
    """What a check of a folder found in order.

    Attributes:
        path: The folder or graph file that was checked.
        graph: What the check of the graph and the weights saw.
        tokenizer: The tokenizer's file, or None for a folder without one.
        components: How many components that tokenizer has; None for one of the older pair of files, which has none.
        trial: What a trial run took, or None where there was none.
        packed: The bytes of the packed weights in the cache; None where there are none, or they were not to be read.
        full: True if they were to be read.
    """

    path: Path
    graph: CheckReport
    tokenizer: Path | None
    components: int | None
    trial: Trial | None
    packed: int | None = None
    full: bool = False

    def lines(self) -> list[str]:
        """What was checked and what was not, in lines of text for people."""
        graph = self.graph
        added = ", ".join(graph.added_operators)
        operators = (
            f"besides operators that graphlens writes, standard ones that an edit may have added: {added}"
            if added
            else "only operators that graphlens itself writes"
        )
        files = ", ".join(graph.external_files) or "the graph file itself"
        lines = [
            f"{self.path}: nothing was found wrong in what was checked:",
            f"- graph: {graph.nodes:,} nodes; {operators}; sizes that the graph states are in proportion to its weights",
            f"- weights: {(graph.external_bytes + graph.embedded_bytes) / 1e6:,.1f} MB in {files}; every byte of the weights "
            "files is the one that the manifest has a digest of",
        ]
        if self.tokenizer is None:
            lines.append("- tokenizer: there is none")
        else:
            inside = "" if self.components is None else f"{self.components} components of known types, "
            lines.append(f"- {self.tokenizer.name}: {inside}sizes and patterns within bounds")
        if self.full:
            made = (
                "none were made"
                if self.packed is None
                else f"every byte of {self.packed / 1e6:,.1f} MB is as it was written"
            )
            lines.append(f"- weights packed for this processor, in the cache: {made}")
        not_checked = ["whether the model is the one that its name says (whoever writes a file writes its digests too)"]
        if self.trial is None:
            not_checked.append("how ONNX Runtime copes with the file (--run tries it in a process of its own)")
        else:
            lines.append(f"- trial run: {_described(self.trial)}")
            not_checked.append("longer prompts than the trial's")
        return [*lines, f"Not checked: {'; '.join(not_checked)}."]


def _described(trial: Trial) -> str:
    """What a trial run took, in words."""
    limit = (
        "no limit of memory on this system"
        if trial.memory_limit is None
        else f"at most {trial.memory_limit / 1e9:,.1f} GB"
    )
    text = "" if trial.tokens is None else f", and a sample text has {trial.tokens} tokens"
    return (
        f"opened in {trial.open_seconds:.2f} s and ran once in {trial.run_seconds:.2f} s on a short prompt, in a process of its "
        f"own with {limit}; it gave {trial.outputs} values{text}"
    )


def check_folder(
    path: str | os.PathLike[str],
    run: bool = False,
    memory: int | None = None,
    seconds: float = SECONDS,
    full: bool = False,
) -> Checked:
    """Checks a hooked folder from a stranger: its graph, every byte of its weights, its tokenizer, and a trial run if wanted.

    Args:
        path: A hooked folder or its graph file.
        run: True opens it in ONNX Runtime as well and runs it once, in a child process. See ``try_out``.
        memory: The bytes of memory that the process may have; see there.
        seconds: How long it may take; see there.
        full: True reads the weights that were packed for this file in the cache as well.

    Returns:
        What was found in order.

    Raises:
        ModelFileError: Something is not; the message says what.
    """
    graph = check(path)
    folder = model_path(path).parent
    tokenizer, components = folder / TOKENIZER_FILE, None
    if tokenizer.is_file():
        components = check_tokenizer(read_checked(tokenizer), tokenizer)
    else:
        tokenizer = folder / VOCAB_FILE
        for name in (VOCAB_FILE, MERGES_FILE):
            if (folder / name).is_file():
                read_checked(folder / name)
    packed = packed_weights.verify(model_path(path)) if full else None
    trial = None
    if run:
        trial = try_out(Path(path), graph.embedded_bytes + graph.external_bytes, memory, seconds)
    return Checked(Path(path), graph, tokenizer if tokenizer.is_file() else None, components, trial, packed, full)
