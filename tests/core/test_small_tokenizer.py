"""The tokenizer without transformers, and that transformers is imported no earlier than it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from graphlens import HookedTransformer, InputError
from graphlens.file.tokenizer import Tokenizer, load_tokenizer

PROMPT = "When John and Mary went to the store"
RUN = """
import sys
REFUSE
from graphlens import HookedTransformer

model = HookedTransformer.from_onnx(sys.argv[1], "cpu")
model.to_tokens("When John")
model.generate(["When John", "The"], max_new_tokens=2, verbose=False)
print(*{name.partition(".")[0] for name in sys.modules} & {"torch", "transformers"})
ids = model.tokenizer("When John")["input_ids"]
assert ids == model.to_tokens("When John")[0].tolist()
print(type(model.tokenizer).__module__.partition(".")[0])
"""
REFUSE = """
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"refused: {name}", name=name)

sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def small(tiny_folder: Path) -> Tokenizer:
    found = load_tokenizer(tiny_folder)
    assert found is not None
    return found


def test_without_transformers_the_model_has_the_small_one(tiny_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("REFUSE", REFUSE), str(tiny_folder)],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["graphlens"]


def test_opening_and_running_import_no_transformers(tiny_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("REFUSE", ""), str(tiny_folder)],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() in (["transformers"], ["graphlens"])  # nothing before it was asked for


def test_it_answers_as_the_tokenizers_package(small: Tokenizer, tiny: HookedTransformer) -> None:
    ids = small.fast.encode(PROMPT, add_special_tokens=False).ids
    assert small.encode(PROMPT) == small(PROMPT)["input_ids"] == ids  # the files alone put nothing before it
    assert not small.prepends_bos
    assert tiny.to_tokens(PROMPT, prepend_bos=False)[0].tolist() == ids
    small.put_bos_first()
    assert small.encode(PROMPT) == small(PROMPT).input_ids == [0, *ids]
    assert small.prepends_bos
    assert small.encode(PROMPT, add_special_tokens=False) == ids
    assert small.decode(np.asarray(ids)) == small.decode([0, *ids], skip_special_tokens=True) == PROMPT
    assert small.batch_decode([ids, ids[:1]]) == [PROMPT, "When"]
    assert small.tokenize(PROMPT) == small.fast.encode(PROMPT, add_special_tokens=False).tokens
    assert small.convert_ids_to_tokens(small.convert_tokens_to_ids(small.tokenize(PROMPT))) == small.tokenize(PROMPT)
    assert len(small) == len(small.get_vocab()) == len(small.vocab)


def test_padding_has_a_mask(small: Tokenizer) -> None:
    batch = small([PROMPT, "When"], padding=True, return_tensors="np")
    assert batch.input_ids.shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(small.encode(PROMPT)), 1]
    left = small([PROMPT, "When"], padding=True, padding_side="left", return_tensors="np")
    np.testing.assert_array_equal(left["attention_mask"], batch["attention_mask"][:, ::-1])
    with pytest.raises(InputError, match="padding=True"):
        small([PROMPT, "When"], return_tensors="np")
    small.pad_token = None
    with pytest.raises(InputError, match="needs a PAD token"):
        small([PROMPT, "When"], padding=True)


def test_special_tokens_are_set_by_text_or_id(small: Tokenizer) -> None:
    small.pad_token_id = 7
    assert small.pad_token == small.fast.id_to_token(7)
    small.eos_token = small.fast.id_to_token(9)
    assert (small.eos_token_id, small.bos_token_id) == (9, 0)
    small.eos_token_id = None
    assert small.eos_token is None
    for wrong in ("no such token", 10**6, 1.5):
        with pytest.raises(InputError, match="pad_token cannot be"):
            small.pad_token = wrong  # type: ignore[assignment]
    assert small.pad_token_id == 7
