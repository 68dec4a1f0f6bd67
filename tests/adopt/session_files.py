"""The foreign files of a test session: made where the tools are here, unpacked where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.adopt.adopt_files import Files
from tests.adopt.fixtures import FIXTURES, fixture

torch.set_num_threads(1)  # the matrices are tiny


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root: Path = tmp_path_factory.mktemp("adopt")
    for name, route in FIXTURES:
        fixture(name, route, root / "files" / f"{name}.{route}.onnx")
    return Files(root)
