"""What a model folder holds besides graph and weights: its settings and its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
SETTINGS = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def copy_settings(source: Path, target: Path) -> None:
    """Copies those files that ``source`` has to ``target``."""
    for file in SETTINGS:
        if (source / file).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / file, target / file)
