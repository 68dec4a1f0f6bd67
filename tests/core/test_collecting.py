"""The garbage collector rests while a model is opened, and is as it was afterwards."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphlens import HookedTransformer
from graphlens.engine import engine
from graphlens.engine.collecting import uncollected
from graphlens.errors import ModelFileError


@pytest.fixture(autouse=True)
def _on_again() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("on", [True, False])
def test_it_rests_while_a_model_is_opened(on: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    real = engine.OpenedFiles.add

    def spy(self: engine.OpenedFiles, *arguments: object) -> None:
        seen.append(gc.isenabled())
        real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.OpenedFiles, "add", spy)
    (gc.enable if on else gc.disable)()
    HookedTransformer.from_pretrained("tiny-gpt2")
    assert seen == [False]
    assert gc.isenabled() is on
    with pytest.raises(ModelFileError):
        HookedTransformer.from_onnx(tmp_path / "nothing")
    assert gc.isenabled() is on


def test_calls_may_overlap_and_the_last_one_ends_the_rest() -> None:
    inside, leave, found = threading.Event(), threading.Event(), []

    @uncollected
    def first() -> None:
        inside.set()
        leave.wait(10)

    @uncollected
    def second() -> None:
        found.append(gc.isenabled())

    other = threading.Thread(target=first)
    other.start()
    assert inside.wait(10)
    second()
    found.append(gc.isenabled())  # the first one goes on
    leave.set()
    other.join()
    assert found == [False, False]
    assert gc.isenabled()
