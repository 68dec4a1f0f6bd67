"""``graphlens features``: what its page holds is what the API gives; what cannot be is a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphlens import HookedTransformer, Sae, feature_page
from tests.command_line import graphlens, sentence

TEXTS = [
    "When John and Mary went to the store, John gave a drink to Mary",
    "After Tom and Anna left the park, Tom handed the ball to Anna",
    "Then Mary and Tom had a long talk",
]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An SAE's folder and a file of texts."""
    root, random = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    rows = random.standard_normal((64, 128)) / 11
    Sae.from_arrays(rows.T, np.zeros(64), rows, np.zeros(128), "blocks.2.hook_resid_post", "topk", k=4).save(
        root / "sae"
    )
    (root / "texts.txt").write_text("\n".join(TEXTS))
    return root / "sae", root / "texts.txt"


def test_features_by_number(there: tuple[Path, Path], tmp_path: Path) -> None:
    sae, texts = there
    page = tmp_path / "page.html"
    done = graphlens("features", "tiny-gpt2", sae, texts, "--feature", "3", "--feature", "40", "--top", "2", "-o", page)
    assert done.returncode == 0, done.stderr
    assert "3 documents" in done.stderr
    model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    bos = model.tokenizer.bos_token_id
    tokens = [model.to_tokens(text)[0] for text in TEXTS]
    longest = max(map(len, tokens))
    ids = np.stack([np.pad(row, (longest - len(row), 0)) for row in tokens])
    mask = np.stack([np.pad(np.ones_like(row), (longest - len(row), 0)) for row in tokens])
    expected = feature_page(model, ids, Sae.from_folder(sae), [3, 40], k=2, exclude=[bos], attention_mask=mask)
    assert page.read_text("utf-8") == expected.html()


def test_without_a_number_the_rarest_are_taken(there: tuple[Path, Path], tmp_path: Path) -> None:
    done = graphlens("features", "tiny-gpt2", *there, "--documents", "2", "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "2 documents" in done.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--feature", "64"], "there is no feature 64"),
        (["-o", "here.txt"], "ends in .html"),
        (["--hook", "blocks.9.hook_resid_post", "--feature", "3"], "blocks.9.hook_resid_post"),
    ],
)
def test_what_is_refused(there: tuple[Path, Path], tmp_path: Path, words: list[str], said: str) -> None:
    page = () if "-o" in words else ("-o", tmp_path / "page.html")
    assert said in sentence(graphlens("features", "tiny-gpt2", *there, *words, *page).stderr)
