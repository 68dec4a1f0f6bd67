"""What of known architectures is not exported is refused by its name, before any weight is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from graphlens.errors import ExportError
from graphlens.export.checkpoint import family_of, hf_config_of
from graphlens.export.families import families
from tests.families.refused import REFUSED
from tests.families.variants import VARIANTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused(what: str, tmp_path: Path) -> None:
    refused = REFUSED[what]
    getattr(transformers, refused.config)(**refused.arguments).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=rf"^mine: .*{refused.said}"):
        family_of(tmp_path, "mine").spec_of(hf_config_of(tmp_path, "mine"), "mine")


def test_the_page_of_models_has_every_family_and_variant() -> None:
    text = PAGE.read_text(encoding="utf-8")
    ours = [
        family for family in families() if family.spec.__module__.startswith("graphlens.")
    ]  # other tests register theirs
    lacking = [family.architecture for family in ours if f"\n## {family.architecture}\n" not in text]
    lacking += [name for name in VARIANTS if f"\n| {name} | " not in text]
    lacking += [what for what in REFUSED if f"\n| {what} | " not in text]
    assert not lacking, "run python -m tests.families --all --table docs/models.md"
