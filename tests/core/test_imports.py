"""Who imports whom: the wings stay blind to each other, and heavy packages are loaded only where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import graphlens

ROOT = Path(graphlens.__file__).resolve().parent
WINGS = ("export", "surgery", "runtime", "analysis")
# What the wings stand on, and what each of these may import of graphlens.
LEAVES = {
    "folders": (),
    "errors": (),
    "terminal": (),
    "gradient_names": (),
    "manifest": ("errors",),
    "hook_points": ("errors", "manifest"),
    "weights": ("errors", "manifest"),
    "interventions": ("errors",),
    "gating": ("errors", "interventions", "manifest"),
}
# Packages each wing may not import, not even inside a function.
FORBIDDEN = {
    "export": ("onnxruntime", "onnxruntime_extensions"),
    "surgery": ("onnxruntime", "onnxruntime_extensions", "torch", "transformers", "onnxscript"),
    "runtime": ("onnx", "onnx_ir", "onnxscript", "torch", "transformers"),
    "analysis": ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_extensions", "torch", "transformers"),
}
# Where torch and transformers may be imported.
TORCH_SIDE = ("graphlens.export", "graphlens.torch", "graphlens.verify", "graphlens.exporter")


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package: dotted name, syntax tree."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text(encoding="utf-8"))


PACKAGES = {".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("__init__.py")}


def imports(module: str, tree: ast.AST) -> set[str]:
    """Everything a module imports anywhere in it, by dotted name: ``from a import b`` gives ``a.b``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if module in PACKAGES else module.split(".")[:-1]
            prefix = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*prefix, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
    return found


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def wrong(module: str, tree: ast.AST) -> list[str]:
    """The imports of a module that its place in the house does not allow."""
    found = sorted(imports(module, tree))
    own = [name for name in found if is_in(name, "graphlens")]
    place = module.split(".")[1] if "." in module else ""
    bad = []
    if place in WINGS:
        ground = [f"graphlens.{name}" for name in (place, *LEAVES)]
        bad += [name for name in own if not is_in(name, *ground)]
        bad += [name for name in found if is_in(name, *FORBIDDEN[place])]
    if place in LEAVES:
        bad += [name for name in own if not is_in(name, *(f"graphlens.{below}" for below in LEAVES[place]))]
        heavy = ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "onnxruntime_extensions")
        bad += [name for name in found if is_in(name, *heavy)]
    if not is_in(module, *TORCH_SIDE):
        bad += [name for name in found if is_in(name, "torch", "transformers", "onnxscript")]
    if place != "runtime":
        bad += [name for name in found if is_in(name, "onnxruntime")]
    # Its package imports torch where that is installed; runtime/callbacks.py loads what is needed.
    bad += [name for name in found if is_in(name, "onnxruntime_extensions")]
    return bad


ALL = dict(modules())


def test_the_walk_sees_the_whole_package() -> None:
    assert {"graphlens", "graphlens.cli", "graphlens.engine", "graphlens.torch"} <= set(ALL)
    for wing in WINGS:
        assert len([name for name in ALL if is_in(name, f"graphlens.{wing}")]) >= 3
    assert {f"graphlens.{leaf}" for leaf in LEAVES} <= set(ALL)
    assert len(ALL) > 30


@pytest.mark.parametrize("module", ALL)
def test_a_module_imports_only_what_its_place_allows(module: str) -> None:
    assert wrong(module, ALL[module]) == []


@pytest.mark.parametrize(
    ("module", "code", "found"),
    [
        ("graphlens.surgery.splice", "from graphlens.runtime import Session", "graphlens.runtime.Session"),
        ("graphlens.surgery.splice", "from graphlens import runtime", "graphlens.runtime"),
        ("graphlens.surgery.splice", "from .. import runtime", "graphlens.runtime"),
        ("graphlens.surgery", "from ..runtime.sessions import Session", "graphlens.runtime.sessions.Session"),
        ("graphlens.surgery.splice", "def f():\n    import onnxruntime as ort", "onnxruntime"),
        ("graphlens.surgery.files", "if TYPE_CHECKING:\n    from torch import nn", "torch.nn"),
        ("graphlens.runtime.sessions", "import onnx.helper", "onnx.helper"),
        ("graphlens.runtime.sessions", "import importlib\nimportlib.import_module('onnx_ir')", "onnx_ir"),
        ("graphlens.runtime.callbacks", "import onnxruntime_extensions", "onnxruntime_extensions"),
        ("graphlens.analysis.numerics", "from graphlens.engine import Engine", "graphlens.engine.Engine"),
        ("graphlens.analysis.numerics", "from torch.nn import functional", "torch.nn.functional"),
        ("graphlens.export.build", "from graphlens.surgery import splice", "graphlens.surgery.splice"),
        ("graphlens.errors", "from graphlens.manifest import Manifest", "graphlens.manifest.Manifest"),
        ("graphlens.weights", "from graphlens.surgery import check", "graphlens.surgery.check"),
        ("graphlens.engine", "import transformers", "transformers"),
        ("graphlens.cli", "import torch", "torch"),
        ("graphlens.exporter", "import onnxruntime", "onnxruntime"),
    ],
)
def test_a_forbidden_import_is_found_however_it_is_written(module: str, code: str, found: str) -> None:
    assert found in wrong(module, ast.parse(code))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("graphlens.surgery.splice", "from graphlens.surgery.files import load\nfrom graphlens import hook_points"),
        ("graphlens.surgery.files", "import onnx\nimport onnx_ir as ir\nimport onnx_graphsurgeon"),
        ("graphlens.runtime.sessions", "import onnxruntime\nfrom graphlens.errors import InputError"),
        ("graphlens.exporter", "import transformers\nfrom graphlens import surgery"),
        ("graphlens.verify", "import torch"),
        ("graphlens.torch", "import torch"),
    ],
)
def test_an_allowed_import_is_not_found(module: str, code: str) -> None:
    assert wrong(module, ast.parse(code)) == []


# In a fresh interpreter


REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers", "onnxscript"):
            raise ModuleNotFoundError(f"refused: {name}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def in_a_process(code: str, cwd: Path, *arguments: object) -> str:
    """What a program printed, run by this interpreter in another folder; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_graphlens_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, graphlens; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(in_a_process(code, tmp_path).split())
    assert "graphlens" in loaded
    heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_extensions", "onnxscript"}
    assert not loaded & (heavy | {"tokenizers", "huggingface_hub", "safetensors", "rich", "typer", "pandas"})


def test_the_model_class_is_there_without_onnx_runtime_or_onnx(tmp_path: Path) -> None:
    code = "import sys, graphlens; graphlens.HookedTransformer; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(in_a_process(code, tmp_path).split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_extensions"}


def test_every_public_name_is_there() -> None:
    assert dir(graphlens) == sorted(graphlens.__all__)
    for name in graphlens.__all__:
        assert getattr(graphlens, name).__module__.startswith("graphlens.")
    with pytest.raises(AttributeError, match="'graphlens' has no attribute 'HookedTransformr'"):
        graphlens.HookedTransformr  # noqa: B018


def test_a_model_is_opened_read_edited_and_checked_without_torch(tiny_folder: Path, tmp_path: Path) -> None:
    code = """
import graphlens
from graphlens import surgery

model = graphlens.HookedTransformer.from_onnx(sys.argv[1])
loss, cache = model.run_with_cache("When John and Mary went to the store", return_type="loss")
edited = model.run_with_hooks(
    "When John and Mary went to the store",
    fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0)],
    return_type="loss",
)
assert edited != loss
assert len(cache) == len(model.hook_dict)
surgery.check(sys.argv[1])
surgery.save(surgery.strip(surgery.load(sys.argv[1])), sys.argv[2])
graphlens.HookedTransformer.from_pretrained_no_processing(sys.argv[1]).to_string([1, 2])
assert not {"torch", "transformers", "onnxscript"} & set(sys.modules)
print("done")
"""
    assert in_a_process(REFUSE + code, tmp_path, tiny_folder, tmp_path / "saved") == "done"


def test_every_module_but_the_exporters_and_the_torch_face_imports_without_torch(tmp_path: Path) -> None:
    names = [name for name in ALL if not is_in(name, "graphlens.export", "graphlens.torch")]
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(len(sys.argv) - 1)"
    assert in_a_process(REFUSE + code, tmp_path, *names) == str(len(names))


def test_the_torch_face_without_torch_names_the_extra(tmp_path: Path) -> None:
    code = """
import graphlens
try:
    import graphlens.torch
except graphlens.RuntimeUnavailable as error:
    print(error)
"""
    assert "graphlens-onnx[torch]" in in_a_process(REFUSE + code, tmp_path)


def test_exporting_without_torch_names_the_extra(tiny_folder: Path, tmp_path: Path) -> None:
    code = """
import graphlens
try:
    graphlens.export_model(sys.argv[1], sys.argv[2])
except graphlens.RuntimeUnavailable as error:
    print(error)
"""
    said = in_a_process(REFUSE + code, tmp_path, tiny_folder, tmp_path / "out")
    assert "torch" in said
    assert "graphlens-onnx[export]" in said
    assert not (tmp_path / "out").exists()
