"""A folder's tokenizer files, and the BOS, EOS and PAD rules that they state. No transformers needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.errors import ModelFileError
from graphlens.file.folder import CONFIG_FILE
from graphlens.file.settings import read_settings
from graphlens.file.small_tokenizer import Tokenizer as Tokenizer
from graphlens.file.tokenizer_check import MAX_TOKENS, check_tokenizer, read_checked
from graphlens.file.tokenizer_parts import ROLES, asking

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

    from graphlens.file.manifest import Json

_SETTINGS = "tokenizer_config.json"
TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder.

    Args:
        folder: A checkpoint or hooked folder.

    Returns:
        The tokenizer, or None if the folder holds no tokenizer files.

    Raises:
        ModelFileError: The files are malformed.
    """
    from tokenizers import Tokenizer as FastTokenizer

    file = next((folder / name for name in (TOKENIZER_FILE, VOCAB_FILE) if (folder / name).is_file()), None)
    if file is None or (file.name == VOCAB_FILE and not (folder / MERGES_FILE).is_file()):
        return None
    try:
        with asking(file):
            if file.name == TOKENIZER_FILE:
                data = read_checked(file)
                check_tokenizer(data, file)
                fast = FastTokenizer.from_buffer(data)  # the bytes that were checked, and no other file of that name
            else:
                fast = _byte_level(folder)
            settings = read_settings(folder / _SETTINGS)
            tokenizer = Tokenizer(fast, _special_tokens(folder, fast), _padding_side(folder), file, settings)
            # A null there says that there is none: what the model's config names is no BOS to put before every text.
            tokenizer.truncation_side = "left" if settings.get("truncation_side") == "left" else "right"
            tokenizer.names_bos &= settings.get("bos_token", "not said") is not None
            return tokenizer
    except ModelFileError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise ModelFileError(f"{folder}: its tokenizer files cannot be read ({error}).") from error


def _byte_level(folder: Path) -> FastTokenizer:
    """The byte-level BPE of the older pair of files, vocab.json and merges.txt, which GPT-2's checkpoints hold."""
    from tokenizers import AddedToken, decoders, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    vocab = json.loads(read_checked(folder / VOCAB_FILE))
    lines = read_checked(folder / MERGES_FILE).decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    merges = [(left, right) for line in lines if not line.startswith("#version") for left, right in [line.split(" ")]]
    if not isinstance(vocab, dict) or max(len(vocab), len(merges)) > MAX_TOKENS:
        raise ValueError(f"{VOCAB_FILE} is no vocabulary, or has more than {MAX_TOKENS:,} tokens")
    fast = FastTokenizer(BPE(vocab, merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = [name for name in ("<|endoftext|>",) if fast.token_to_id(name) is not None]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return fast


def _padding_side(folder: Path) -> str:
    """The padding side that a folder's tokenizer settings name, else "right"."""
    side = read_settings(folder / _SETTINGS).get("padding_side") or "right"
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}, neither 'left' nor 'right'")
    return str(side)


def _special_tokens(folder: Path, fast: FastTokenizer) -> dict[str, str]:
    """Role -> text of the special tokens that a folder's files name, the tokenizer's settings before the model's."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", _SETTINGS):
        data = read_settings(folder / name)
        for role in ROLES:
            token = data.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and fast.token_to_id(text) is not None:
                found[role] = text
    config = read_settings(folder / CONFIG_FILE)
    for role in ("bos_token", "eos_token"):
        if role not in found and (text := _first_token(config.get(f"{role}_id"), fast)) is not None:
            found[role] = text
    return found


def _first_token(ids: Json, fast: FastTokenizer) -> str | None:
    """The text of a token id, or of the first that the tokenizer knows of a list of ids."""
    texts = (fast.id_to_token(index) for index in (ids if isinstance(ids, list) else [ids]) if isinstance(index, int))
    return next((text for text in texts if text is not None), None)
