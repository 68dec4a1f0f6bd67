"""The foreign files of the matrix: which route makes which kind of file of which family, and where the files are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.adopt import genai_routes, torch_routes
from tests.adopt.checkpoints import CHECKPOINTS, FAMILIES, checkpoint_of
from tests.adopt.made_smaller import make_smaller

FLOAT, HALF, QUANTISED = "float", "half", "quantised"
OPTIMUM = Path(__file__).parent / "elsewhere" / "optimum_files.py"
DECODERS = tuple(name for name in FAMILIES if CHECKPOINTS[name].kind == "decoder")
EVERY = FAMILIES
# The families whose optimisations optimum knows; it refuses the others by name.
OPTIMISED = ("gpt2", "llama", "neox", "bert", "vit")


class NoFile(Exception):  # not an error of ours
    """A tool refuses to make a file; its words."""


@dataclass(frozen=True)
class Route:
    """A kind of file.

    Attributes:
        said: What the table calls it.
        numbers: FLOAT, HALF or QUANTISED.
        families: Those that the tool makes it of.
        make: Called with (files, family, target).
        elsewhere: True if the tool lives in an environment of its own, or takes long: CI has a committed file of it.
    """

    said: str
    numbers: str
    families: tuple[str, ...]
    make: Callable[[Files, str, Path], None]
    elsewhere: bool = False


class Files:
    """A folder of checkpoints and of files that were made of them.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def checkpoint(self, family: str) -> Path:
        """A family's checkpoint folder."""
        return checkpoint_of(family, self.root / "ckpt")

    def own(self, family: str) -> Path:
        """graphlens's own export of the same checkpoint."""
        import graphlens

        folder = self.root / "own" / family
        if not folder.exists():
            graphlens.export_model(self.checkpoint(family), folder, announce=lambda _: None)
        return folder

    def path(self, family: str, route: str) -> Path:
        """A file, made where it is not there yet.

        Raises:
            NoFile: The tool refuses; its words are kept beside where the file would be.
        """
        target = self.root / "files" / f"{family}.{route}.onnx"
        words = target.with_suffix(".refused")
        if words.exists():
            raise NoFile(words.read_text("utf-8"))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                ROUTES[route].make(self, family, target)
                _ensure_opens(target)
            except Exception as error:
                target.unlink(missing_ok=True)
                words.write_text(f"{type(error).__name__}: {str(error).strip()[:400]}", "utf-8")
                raise NoFile(words.read_text("utf-8")) from error
        return target


def _ensure_opens(target: Path) -> None:
    """A file that ONNX Runtime itself refuses is no file to adopt."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])


def _legacy(files: Files, family: str, target: Path, **options: bool | str) -> None:
    torch_routes.legacy(family, files.checkpoint(family), target, **options)  # type: ignore[arg-type]


def _dynamo(files: Files, family: str, target: Path, opset: int, **options: bool | str) -> None:
    torch_routes.dynamo(family, files.checkpoint(family), target, opset, **options)  # type: ignore[arg-type]


def _made_of(files: Files, family: str, target: Path, source: str, by: str) -> None:
    make_smaller(by, family, files.path(family, source), target)


def _genai(files: Files, family: str, target: Path, precision: str) -> None:
    genai_routes.build(files.checkpoint(family), target, precision)


def _optimum(files: Files, family: str, target: Path) -> None:
    """Runs optimum's script in the environment that GRAPHLENS_OPTIMUM_PYTHON names."""
    python = os.environ.get("GRAPHLENS_OPTIMUM_PYTHON", "")
    if not python:
        raise RuntimeError("GRAPHLENS_OPTIMUM_PYTHON names no Python with optimum-onnx")
    checkpoint = files.checkpoint(family).resolve()
    command = [python, str(OPTIMUM), str(checkpoint), str(target.parent.resolve()), family, target.name.split(".")[1]]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def _made_smaller(source: str, by: dict[str, tuple[str, str]], families: tuple[str, ...] = EVERY) -> dict[str, Route]:
    """Route -> how it is made of another: by name of the tool -> (what the table says, numbers)."""
    return {
        f"{source}.{name}": Route(said, numbers, families, partial(_made_of, source=source, by=name))
        for name, (said, numbers) in by.items()
    }


_SMALLER = {
    "int8": ("quantize_dynamic, per tensor", QUANTISED),
    "int8-channel": ("quantize_dynamic, per channel", QUANTISED),
    "int8-all": ("quantize_dynamic, products of activations too", QUANTISED),
    "int4": ("MatMulNBits (int4)", QUANTISED),
    "qdq": ("quantize_static, QDQ", QUANTISED),
    "qoperator": ("quantize_static, QOperator", QUANTISED),
    "fp16": ("float16 converter", HALF),
    "ort0": ("ONNX Runtime's transformers.optimizer, level 0", FLOAT),
    "ort1": ("the same, level 1", FLOAT),
    "ort2": ("the same, level 2", FLOAT),
    "ort99": ("the same, level 99", FLOAT),
    "session-basic": ("saved by an ONNX Runtime session, basic", FLOAT),
    "session-extended": ("the same, extended", FLOAT),
    "session-all": ("the same, all", FLOAT),
    "fusions": ("onnxscript optimize_for_ort", FLOAT),
}


def _after(made: str, names: str) -> dict[str, tuple[str, str]]:
    return {name: (f"{made}, then {_SMALLER[name][0]}", _SMALLER[name][1]) for name in names.split()}


ROUTES: dict[str, Route] = {
    "legacy-eager": Route("torch, older exporter, eager attention", FLOAT, EVERY, _legacy),
    "legacy-sdpa": Route("torch, older exporter, sdpa", FLOAT, EVERY, partial(_legacy, attention="sdpa")),
    "legacy-past": Route("torch, older exporter, with past", FLOAT, DECODERS, partial(_legacy, past=True)),
    **{
        f"dynamo{opset}-{attention}": Route(
            f"torch dynamo, opset {opset}, {attention}",
            FLOAT,
            EVERY,
            partial(_dynamo, opset=opset, attention=attention),
        )
        for opset in (18, 20, 23)
        for attention in ("eager", "sdpa")
    },
    "dynamo20-past": Route("torch dynamo, opset 20, with past", FLOAT, DECODERS, partial(_dynamo, opset=20, past=True)),
    "dynamo23-past": Route(
        "torch dynamo, opset 23, sdpa, with past",
        FLOAT,
        DECODERS,
        partial(_dynamo, opset=23, attention="sdpa", past=True),
    ),
    "optimum": Route("optimum-onnx", FLOAT, EVERY, _optimum, elsewhere=True),
    "optimum-O2": Route("optimum-onnx, O2", FLOAT, OPTIMISED, _optimum, elsewhere=True),
    "optimum-O3": Route("optimum-onnx, O3", FLOAT, OPTIMISED, _optimum, elsewhere=True),
    "optimum-past": Route("optimum-onnx, with past", FLOAT, DECODERS, _optimum, elsewhere=True),
    "optimum-past-O2": Route("optimum-onnx, with past, O2", FLOAT, OPTIMISED[:3], _optimum, elsewhere=True),
    "optimum-past-O3": Route("optimum-onnx, with past, O3", FLOAT, OPTIMISED[:3], _optimum, elsewhere=True),
    "optimum-past-int8": Route(
        "optimum-onnx with past, then its own quantiser", QUANTISED, DECODERS, _optimum, elsewhere=True
    ),
    "genai-fp32": Route(
        "onnxruntime-genai builder", FLOAT, genai_routes.FAMILIES, partial(_genai, precision="fp32"), elsewhere=True
    ),
    "genai-int4": Route(
        "onnxruntime-genai builder, int4",
        QUANTISED,
        genai_routes.FAMILIES,
        partial(_genai, precision="int4"),
        elsewhere=True,
    ),
    **_made_smaller("legacy-eager", _SMALLER),
    **_made_smaller("dynamo20-sdpa", _after("torch dynamo, opset 20, sdpa", "int8 int4 qdq fusions")),
    **_made_smaller("dynamo23-sdpa", _after("torch dynamo, opset 23, sdpa", "int8 fusions")),
    **_made_smaller("optimum-past", _after("optimum-onnx with past", "int8 int8-channel int4 qdq"), DECODERS),
    **_made_smaller("optimum", _after("optimum-onnx", "int8 int8-channel int4 qdq"), ("bert", "vit")),
}
