"""The rules of the house: which folder may import which, where heavy packages are loaded, and that nothing reaches inside."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import graphlens
from tools.house import DOORS, HOUSE, LAYOUT

ROOT = Path(graphlens.__file__).resolve().parent
# What cannot be imported without torch.
TORCH_SIDE = (
    *(f"graphlens.{door}" for door in ("export", "torch", "transformer_lens4")),
    *(
        f"graphlens.model.torch_{part}"
        for part in ("border", "config", "face", "factored", "initial", "sampling", "weight")
    ),
    *("graphlens.lens", f"graphlens.{LAYOUT}"),
)
EXPORTING = ("graphlens.export", "graphlens.pipelines.verify", "graphlens.pipelines.export")
HEAVY: dict[str, tuple[str, ...]] = {  # packages that only these places may import, inside a function or not
    "torch": (*TORCH_SIDE, *EXPORTING),
    "transformers": (*EXPORTING, "graphlens.model.of_transformers", "graphlens.lens"),
    "onnxscript": ("graphlens.export",),
    "onnxruntime": ("graphlens.runtime",),
    # Its package imports torch where that is installed; runtime/operators.py loads what is needed.
    "onnxruntime_extensions": (),
    "onnx": ("graphlens.export", "graphlens.surgery", "graphlens.engine", "graphlens.pipelines"),
    "onnx_ir": (
        "graphlens.export",
        "graphlens.surgery",
        "graphlens.engine",
        "graphlens.pipelines",
        *("graphlens.file.firing", "graphlens.file.held", "graphlens.file.stored"),
    ),
}
LAYOUT_OF = f"graphlens.{LAYOUT}"
LONGEST_FILE, LONGEST_TEST_FILE, LONGEST_CHAIN, MOST_ANYS = 400, 600, 13, 249


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package: dotted name, syntax tree."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text(encoding="utf-8"))


PACKAGES = {".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("__init__.py")}


def imports(module: str, tree: ast.AST, nodes: Iterable[ast.AST] | None = None) -> set[str]:
    """Everything a module imports anywhere in it, by dotted name: ``from a import b`` gives ``a.b``."""
    found = set()
    loaders = {"import_module", "__import__"} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == "import_module" and alias.asname
    }
    for node in ast.walk(tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if module in PACKAGES else module.split(".")[:-1]
            prefix = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*prefix, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in loaders
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(resolve_name(node.args[0].value, module if module in PACKAGES else module.rpartition(".")[0]))
    return found


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def wrong(module: str, tree: ast.AST) -> list[str]:
    """The imports of a module that its place in the house does not allow."""
    found = sorted(imports(module, tree))
    bad = []
    place = module.split(".")[1] if "." in module else ""
    if place in HOUSE:
        ground = [f"graphlens.{name}" for name in (place, "errors", *HOUSE[place])]
        bad += [name for name in found if is_in(name, "graphlens") and not is_in(name, *ground)]
    elif place == "errors":
        bad += [name for name in found if is_in(name, "graphlens")]
    for package, places in HEAVY.items():
        if not is_in(module, *places):
            bad += [name for name in found if is_in(name, package)]
    return bad


ALL = dict(modules())


def test_the_walk_sees_the_whole_package() -> None:
    assert {"graphlens", "graphlens.cli.app", "graphlens.engine.engine", "graphlens.torch"} <= set(ALL)
    for folder in HOUSE:
        assert len([name for name in ALL if is_in(name, f"graphlens.{folder}")]) >= 3
    assert len(ALL) > 90


@pytest.mark.parametrize("module", ALL)
def test_a_module_imports_only_what_its_place_allows(module: str) -> None:
    assert wrong(module, ALL[module]) == []


def test_nothing_but_doors_and_errors_lies_in_the_root() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {*DOORS, "errors"}
    inside = [path.relative_to(ROOT).parts for path in ROOT.rglob("*.py")]
    assert {parts[0] for parts in inside if len(parts) > 1} == {*HOUSE, LAYOUT}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_defines_nothing(door: str) -> None:
    tree = ast.parse((ROOT / f"{door}.py").read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert defined <= ({"__getattr__", "__dir__"} if door == "__init__" else set())


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
        ("graphlens.runtime.operators", "import onnxruntime_extensions", "onnxruntime_extensions"),
        ("graphlens.analysis.numerics", "from graphlens.engine import Engine", "graphlens.engine.Engine"),
        ("graphlens.analysis.numerics", "import graphlens.engine.plan as plan", "graphlens.engine.plan"),
        ("graphlens.analysis.numerics", "def f():\n    import graphlens", "graphlens"),
        ("graphlens.analysis.numerics", "import_module('..engine', __package__)", "graphlens.engine"),
        ("graphlens.analysis.numerics", "from importlib import import_module as get\nget('onnx')", "onnx"),
        ("graphlens.analysis.numerics", "from torch.nn import functional", "torch.nn.functional"),
        ("graphlens.export.build", "from graphlens.surgery import splice", "graphlens.surgery.splice"),
        ("graphlens.errors", "from graphlens.file.manifest import Manifest", "graphlens.file.manifest.Manifest"),
        ("graphlens.file.safetensors", "from graphlens.surgery import check", "graphlens.surgery.check"),
        ("graphlens.engine.engine", "import transformers", "transformers"),
        ("graphlens.model.runner", "from graphlens.experiments import sweep", "graphlens.experiments.sweep"),
        ("graphlens.model.runner", "from graphlens.surgery import splice", "graphlens.surgery.splice"),
        ("graphlens.cli.app", "import torch", "torch"),
        ("graphlens.pipelines.export", "import onnxruntime", "onnxruntime"),
    ],
)
def test_a_forbidden_import_is_found_however_it_is_written(module: str, code: str, found: str) -> None:
    assert found in wrong(module, ast.parse(code))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("graphlens.surgery.splice", "from graphlens.surgery.files import load\nfrom graphlens.file import names"),
        ("graphlens.surgery.files", "import onnx\nimport onnx_ir as ir\nimport onnx_graphsurgeon"),
        ("graphlens.runtime.sessions", "import onnxruntime\nfrom graphlens.errors import InputError"),
        ("graphlens.pipelines.export", "import transformers\nfrom graphlens import surgery"),
        ("graphlens.pipelines.verify", "import torch"),
        ("graphlens.torch", "import torch"),
    ],
)
def test_an_allowed_import_is_not_found(module: str, code: str) -> None:
    assert wrong(module, ast.parse(code)) == []


# The shape of the whole


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: not those of functions, nor what is for type checkers."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)


def loaded_by(module: str) -> set[str]:
    """The modules of the package that importing a module imports directly. A folder's __init__ counts as itself."""
    found = set()
    for name in imports(module, ALL[module], at_import(ALL[module])):
        owner = name if name in ALL else name.rpartition(".")[0]
        if owner in ALL and owner != module:
            found.add(owner)
    return found


def test_imports_run_in_no_circle_and_in_short_chains() -> None:
    arrows = {module: loaded_by(module) for module in ALL}
    chains: dict[str, list[str]] = {}

    def chain(module: str, above: tuple[str, ...]) -> list[str]:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}"
        if module not in chains:
            below = [chain(other, (*above, module)) for other in arrows[module]]
            chains[module] = [module, *max(below, key=len, default=[])]
        return chains[module]

    # The layout lies on the doors: its modules, and the package that hands on their names, are two links more.
    longest = max((chain(module, ()) for module in ALL), key=lambda found: len(found) - 2 * is_in(found[0], LAYOUT_OF))
    assert len(longest) <= LONGEST_CHAIN + 2 * is_in(longest[0], LAYOUT_OF), " -> ".join(longest)


def test_no_file_is_long() -> None:
    def longer(folder: Path, limit: int) -> dict[str, int]:
        files = [path for path in folder.rglob("*.py") if "node_modules" not in path.parts]
        sizes = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
        return {path: size for path, size in sizes.items() if size > limit}

    assert longer(ROOT, LONGEST_FILE) == {}
    assert longer(ROOT.parent / "tests", LONGEST_TEST_FILE) == {}


# What is private stays private


def is_private(name: str) -> bool:
    if name.startswith("_repr_") and name.endswith("_"):  # what notebooks ask of an object
        return False
    return name.startswith("_") and not name.startswith("__")


def members(tree: ast.Module) -> set[str]:
    """The names that a module's classes define: methods, fields, and what is assigned to self or cls."""
    found: set[str] = set()
    for node in (inner for kind in ast.walk(tree) if isinstance(kind, ast.ClassDef) for inner in ast.walk(kind)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (inner for outer in targets for inner in ast.walk(outer)):
                if isinstance(target, ast.Name):
                    found.add(target.id)
                elif isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("self", "cls"):
                    found.add(target.attr)
    return found


def private_uses(tree: ast.Module) -> Iterator[str]:
    """What a module reaches that is private to another: as an attribute, in a string that names one, or by an import.

    A module may reach what its own classes define: that is how two objects of a class are compared.
    """
    own = members(tree)

    def of_another(name: str) -> bool:
        return is_private(name) and name not in own

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and of_another(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "sys", "os")):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call):  # getattr(model, "_engine"), monkeypatch.setattr(module, "_limit", 0)
            by_name = ast.unparse(node.func).rpartition(".")[2] in REACHING
            for text in (part.value for part in node.args if isinstance(part, ast.Constant)):
                if isinstance(text, str) and by_name and any(map(of_another, text.split("."))):
                    yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(("__dict__", "vars()")):
            if isinstance(node.slice, ast.Constant) and of_another(str(node.slice.value)):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and (
            node.level or is_in(node.module or "", "graphlens", "tests", "tools")
        ):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"line {node.lineno}: {name}" for name in names if is_private(name))


# Functions that take the name of an attribute as a string.
REACHING = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "patch", "object"}
# Private names of packages without a public door: for Python operators, the kind of attention, a config's name, functions
# without subclasses' handling, what an operator writes into.
FOREIGN = {
    "graphlens/model/torch_weight.py": {"_C", "_schema"},
    **{"tests/parity/test_torch_weights.py": {"_foreach_mul_"}, "tests/parity/test_torch_face.py": {"_C"}},
    "graphlens/pipelines/verify.py": {"_attn_implementation", "_forward_hooks", "_forward_pre_hooks"},
    "graphlens/runtime/operators.py": {"_nativedef", "_on_pyop_invocation"},
    "graphlens/export/trace.py": {"_attn_implementation"},
    "tools/bench/workers/lens.py": {"_name_or_path"},
}
FILES = sorted(
    path.relative_to(ROOT.parent).as_posix()
    for folder in ("graphlens", "tests", "tools")
    for path in (ROOT.parent / folder).rglob("*.py")
    if "node_modules" not in path.parts
)


@pytest.mark.parametrize("file", FILES)
def test_no_file_reaches_into_another(file: str) -> None:
    tree = ast.parse((ROOT.parent / file).read_text(encoding="utf-8"))
    foreign = FOREIGN.get(file, set())
    found = list(private_uses(tree))
    assert [use for use in found if use.rpartition(".")[2] not in foreign] == []
    assert len({use.rpartition(".")[2] for use in found}) == len(foreign)


@pytest.mark.parametrize(
    "code",
    [
        "model._engine",
        "model._engine = 1",
        "def _engine(model):\n    return model._engine",
        "_engine = model._engine",
        "getattr(model, '_engine', None)",
        "monkeypatch.setattr(engine, '_POOL', 1)",
        "monkeypatch.setattr('graphlens.engine.engine._POOL', 1)",
        "mock.patch.object(engine, '_POOL', 1)",
        "mock.patch('graphlens.engine.engine._POOL', 1)",
        "model.__dict__['_engine']",
        "from graphlens.engine.engine import _POOL",
        "from graphlens.engine._pool import POOL",
        "from .engine import _POOL",
    ],
)
def test_a_private_name_is_found_however_it_is_reached(code: str) -> None:
    assert list(private_uses(ast.parse(code))) != []


@pytest.mark.parametrize(
    "code",
    [
        "class A:\n    def __init__(self, b):\n        self._b = b\n    def same(self, other):\n        return other._b",
        "class A:\n    _b: int\n    def same(self, other):\n        return getattr(other, '_b', None)",
        "def f(self):\n    return self._b",
        "model.__dict__['engine'], model.__class__, str('_b')",
        "from torch._subclasses import fake_tensor",
    ],
)
def test_what_a_file_has_itself_is_not_found(code: str) -> None:
    assert list(private_uses(ast.parse(code))) == []


# Types


def loose_models(tree: ast.Module) -> list[str]:
    """The parameters and fields for a model, or a part of one, that may be anything."""
    loose = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            name, annotation = node.arg, node.annotation
        elif isinstance(node, ast.AnnAssign):
            name, annotation = ast.unparse(node.target).rpartition(".")[2], node.annotation
        else:
            continue
        said = ast.unparse(annotation).strip("'\"") if annotation else "Any"
        kinds = {part.strip().removeprefix("typing.") for part in said.split("|")}
        if name in ("model", "runner", "engine", "border") and kinds & {"Any", "object"}:
            loose.append(f"line {node.lineno}: {name}: {said}")
    return loose


def test_nothing_takes_a_model_of_any_kind() -> None:
    assert {module: loose_models(tree) for module, tree in ALL.items() if loose_models(tree)} == {}


@pytest.mark.parametrize("said", ["Any", "typing.Any", "'Any'", "Any | None", "object"])
def test_a_model_of_any_kind_is_found(said: str) -> None:
    for code in (f"def f(model: {said}): ...", f"def f(*, runner: {said}): ...", f"class A:\n    engine: {said}"):
        assert loose_models(ast.parse(code)) != []
    assert loose_models(ast.parse("def f(model: Runner[Any], found: Any): ...")) == []


def test_any_is_rare() -> None:
    files = [path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")]
    assert sum(len(re.findall(r"\bAny\b", text)) for text in files) <= MOST_ANYS


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
    heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_extensions", "rich", "shutil"}
    assert not loaded & heavy


def test_every_public_name_is_there() -> None:
    doors = set(dir(graphlens)) - set(graphlens.__all__)
    assert doors > {"patching", "metrics", "attribution", "interventions", "surgery"}
    assert all((ROOT / f"{door}.py").is_file() or (ROOT / door / "__init__.py").is_file() for door in doors)
    for name in graphlens.__all__:
        assert getattr(graphlens, name).__module__.startswith("graphlens.")
    with pytest.raises(AttributeError, match="'graphlens' has no attribute 'HookedTransformr'"):
        graphlens.HookedTransformr  # noqa: B018


def test_the_doors_are_attributes_that_load_when_they_are_asked_for(tmp_path: Path) -> None:
    code = """
import sys, graphlens
loaded = {name for name in sys.modules if name.startswith("graphlens.")}
assert not loaded, loaded
graphlens.patching.get_act_patch_resid_pre, graphlens.metrics.LogitDiff, graphlens.attribution, graphlens.views
assert graphlens.LogitDiff is graphlens.metrics.LogitDiff and graphlens.sweep is graphlens.patching.sweep
from graphlens.model.hooks import HookPoint
assert graphlens.HookPoint is HookPoint
try:
    graphlens.torch
except ImportError:
    assert "torch" not in sys.modules
print("ok")
"""
    assert in_a_process(code, tmp_path) == "ok"


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
    names = [name for name in ALL if not is_in(name, *TORCH_SIDE) and not name.endswith("__main__")]
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(len(sys.argv) - 1)"
    assert in_a_process(REFUSE + code, tmp_path, *names) == str(len(names))


@pytest.mark.parametrize("door", ["torch", LAYOUT])
def test_the_torch_face_without_torch_names_the_extra(door: str, tmp_path: Path) -> None:
    code = """
import graphlens
try:
    import graphlens.DOOR
except graphlens.RuntimeUnavailable as error:
    print(error)
"""
    assert "graphlens-onnx[torch]" in in_a_process(REFUSE + code.replace("DOOR", door), tmp_path)


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
