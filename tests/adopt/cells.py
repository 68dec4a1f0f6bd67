"""One cell of the matrix: a foreign file adopted, every hook point read and edited beside transformers with torch hooks."""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

import graphlens
from graphlens.errors import GraphlensError
from graphlens.file.names import in_block
from graphlens.interventions import Ablate, Intervention, Patch, Scale, Steer
from tests.adopt.adopt_cases import PAST, cases_of, feeds_of, inputs_of, real_of
from tests.adopt.adopt_files import FLOAT, HALF, QUANTISED, ROUTES, Files, NoFile
from tests.adopt.as_tools_do import NONE, change_of
from tests.adopt.checkpoints import CHECKPOINTS, family_of
from tests.adopt.oracle import Oracle
from tests.families.comparing import edit_of
from tests.scramble import scrambled

# The largest difference from transformers, as a share of max(1, max|reference|). Nothing is promised of quantised files.
ALLOWED = {FLOAT: 1e-4, HALF: 2e-2}
OWN = 1e-5  # the logits of a float file from the original's own, as a share of max(1, max|logits|)
SAME = {FLOAT: 2e-6, HALF: 5e-3, QUANTISED: 1e-5}  # between ways of making the same edit of the same file
IDENTITY = {FLOAT: 1e-5, HALF: 5e-3, QUANTISED: 1e-5}


@dataclass
class Cell:
    """What was found of a file.

    Attributes:
        family: The family.
        route: The kind of file, of ``files.ROUTES``.
        absent: Why there is no such file; "" where there is one.
        hooks: How many of the family's hook points were found.
        wanted: How many there are.
        identities: How many identities were checked.
        identity: The largest residual.
        worst: The largest difference from transformers over all cases and hook points; nan for a quantised file.
        where: Where it is.
        edits: How many edits were compared, and the largest difference.
        edit: See above.
        weights: How many weights were found and compared with those of graphlens's own export.
        failures: What is wrong, a sentence each.
        remarks: What adopting itself says of the file.
        seconds: How long adopting took.
    """

    family: str
    route: str
    absent: str = ""
    hooks: int = 0
    wanted: int = 0
    identities: int = 0
    identity: float = 0.0
    worst: float = float("nan")
    where: str = ""
    edits: int = 0
    edit: float = float("nan")
    weights: int = 0
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        return not self.failures


@cache
def oracle_of(files_root: Path, family: str, route: str = "") -> Oracle:
    """A family's oracle; for a kind of file whose tool computes something else on purpose, one that does the same."""
    if route and change_of(family, route) == NONE:
        return oracle_of(files_root, family)
    return Oracle(family, Files(files_root).checkpoint(family), change_of(family, route))


@cache
def expected(files_root: Path, family: str, case: str, route: str = "") -> Mapping[str, np.ndarray]:
    """A case's activations, inputs and outputs."""
    if route and change_of(family, route) == NONE:
        return expected(files_root, family, case)
    return oracle_of(files_root, family, route).run(case)


@cache
def expected_edit(files_root: Path, family: str, hook: str, route: str = "") -> np.ndarray:
    """transformers' logits of the plain case after ``edit_of`` at a hook point."""
    if route and change_of(family, route) == NONE:
        return expected_edit(files_root, family, hook)
    return oracle_of(files_root, family, route).edited("plain", hook, lambda value: edit_of(hook, value))


def measure(files: Files, family: str, route: str, every_edit: bool = False) -> Cell:
    """Adopts a file and compares everything there is to compare.

    Args:
        files: Where files are.
        family: The family.
        route: The kind of file.
        every_edit: True edits every hook point, False those of one block and those outside blocks.
    """
    cell = Cell(family, route)
    try:
        path = files.path(family, route)
    except NoFile as refused:
        cell.absent = str(refused)
        return cell
    _measured(cell, path, files, every_edit)
    return cell


def measured(path: Path, family: str, route: str, files: Files, every_edit: bool = False) -> Cell:
    """The same of a file that is there."""
    cell = Cell(family, route)
    _measured(cell, path, files, every_edit)
    return cell


def _measured(cell: Cell, path: Path, files: Files, every_edit: bool) -> None:
    folder = files.root / "adopted" / f"{cell.family}.{cell.route}"
    shutil.rmtree(folder, ignore_errors=True)
    cell.wanted = len(_wanted(files, cell.family))
    began = time.perf_counter()
    try:
        # The size of an image is in no graph of dynamic axes; tools write config.json beside their files.
        config = files.checkpoint(cell.family) if CHECKPOINTS[cell.family].kind == "vision" else None
        report = graphlens.adopt(path, folder, config=config, announce=lambda _: None)
    except Exception as error:  # noqa: BLE001 (a cell says what happened in it)
        cell.failures.append(f"adopting: {_said(error)}")
        return
    cell.seconds = round(time.perf_counter() - began, 2)
    cell.remarks = list(report.remarks)
    _compare_hooks(cell, report, files)
    for step in (_compare_values, _compare_original, _compare_weights, _compare_edits, _compare_scrambled):
        try:
            model = opened(folder, cell.family)
            step(cell, model, files, path, every_edit)
        except Exception as error:  # noqa: BLE001
            cell.failures.append(f"{step.__name__.strip('_').replace('_', ' ')}: {_said(error)}")


def _said(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, GraphlensError) else f" ({Path(last.filename).name}:{last.lineno})"
    return f"{type(error).__name__}: {str(error).strip()[:300]}{place}"


def _allowed(cell: Cell) -> float:
    """How far a float or half file may be from transformers."""
    numbers = ROUTES[cell.route].numbers if cell.route in ROUTES else FLOAT
    return ALLOWED[numbers]


def opened(folder: Path, family: str) -> Any:
    """An adopted folder, opened."""
    kind = {"encoder": "HookedEncoder", "vision": "HookedViT"}.get(CHECKPOINTS[family].kind, "HookedTransformer")
    return getattr(graphlens, kind).from_onnx(folder, "cpu")


def _wanted(files: Files, family: str) -> list[str]:
    """The hook points of a family, in the order that transformers computes them."""
    return [name for name in expected(files.root, family, "plain") if not name.startswith(("in.", "out."))]


def _compare_hooks(cell: Cell, report: Any, files: Files) -> None:
    """Which of the family's hook points were found, and whether their identities hold."""
    wanted = _wanted(files, cell.family)
    found = set(report.hooks)
    cell.hooks = len(found & set(wanted))
    cell.identities, cell.identity = len(report.identities), max(report.identities.values(), default=0.0)
    for name in wanted:
        if name not in found:
            why = report.failed.get(name) or report.adopted.missing.get(name) or "no reason given"
            cell.failures.append(f"missing {name}: {why[:200]}")
    if extra := found - set(wanted):
        cell.failures.append(f"hook points that the family does not have: {', '.join(sorted(extra))}")
    if not report.identities:
        cell.failures.append("no identity was checked")
    elif cell.identity > IDENTITY[ROUTES[cell.route].numbers if cell.route in ROUTES else FLOAT]:
        cell.failures.append(f"an identity holds only to {cell.identity:.1e}")


def arguments_of(family: str, case: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a case as our model takes them: (arguments, named arguments)."""
    given = inputs_of(family, case)
    if "pixel_values" in given:
        return (given["pixel_values"],), {}
    options = {"attention_mask": given["attention_mask"]}
    if "token_type_ids" in given:
        options["token_type_ids"] = given["token_type_ids"]
    if case == "plain" and CHECKPOINTS[family].kind == "decoder":
        options = {}
    return (given["input_ids"],), options


def inputs_of_file(path: Path) -> set[str]:
    """The names of a file's inputs."""
    return {value.name for value in onnx.load(path, load_external_data=False).graph.input}


def usable_cases(family: str, route: str, inputs: set[str]) -> Iterator[str]:
    """The cases that a file can be run on.

    Args:
        family: The family.
        route: The kind of file: genai's attention counts padding on the right alone.
        inputs: The names of the file's inputs.
    """
    for case in cases_of(family):
        if case in PAST:
            if any(name.startswith("past") for name in inputs):
                yield case
        elif case in ("left", "counted"):
            if "genai" not in route and ("position_ids" in inputs) == (case == "counted"):
                yield case
        else:
            yield case


def _compare_values(cell: Cell, model: Any, files: Files, path: Path, _every: bool) -> None:
    """Every activation and the logits of every case, beside transformers'."""
    numbers = ROUTES[cell.route].numbers if cell.route in ROUTES else FLOAT
    for case in usable_cases(cell.family, cell.route, inputs_of_file(path)):
        reference = expected(files.root, cell.family, case, cell.route)
        logits, found = run_case(model, cell.family, case)
        real = real_of({key[3:]: value for key, value in reference.items() if key.startswith("in.")})
        pairs = {"out.logits": logits, **{name: found[name] for name in _wanted(files, cell.family) if name in found}}
        for name, value in pairs.items():
            share = difference(np.asarray(value), reference[name], real, name, f"{case} {name}", numbers)
            if numbers != QUANTISED and not share <= cell.worst:
                cell.worst, cell.where = share, f"{case} {name}"
    if numbers != QUANTISED and not cell.worst <= _allowed(cell):
        cell.failures.append(f"{cell.where} differs from transformers by {cell.worst:.1e}")


def _compare_original(cell: Cell, model: Any, files: Files, path: Path, _every: bool) -> None:
    """The logits of a float file beside what the file itself gives in plain ONNX Runtime, whatever its tool made of the model."""
    if (ROUTES[cell.route].numbers if cell.route in ROUTES else FLOAT) != FLOAT:
        return
    genai = "genai" in cell.route
    if genai and family_of(cell.family) == "gemma2":
        return  # ONNX Runtime runs its windowed layers from a past alone; tests/core/test_unfuse_grouped.py compares these
    saved = expected(files.root, cell.family, "plain")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    original = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = feeds_of(cell.family, saved, [value.name for value in original.get_inputs()])
    if genai:  # whose attention takes one prompt at a time
        feeds = {name: array[:1] for name, array in feeds.items()}
    (own,) = original.run([original.get_outputs()[0].name], feeds)
    logits, _ = run_case(model, cell.family, "plain")
    apart = float(np.abs(np.asarray(logits)[: len(own)] - own).max() / max(1.0, np.abs(own).max()))
    if not apart <= OWN:
        cell.failures.append(f"the logits differ from the original's own by {apart:.1e}")


# How far a dequantised weight is from the float one, as a share of the largest: half a step of 127 or of 7, and the rest.
STEP = {"int8": 0.01, "int4": 0.2}


def _compare_weights(cell: Cell, model: Any, files: Files, _path: Path, _every: bool) -> None:
    """Every weight beside that of graphlens's own export of the checkpoint."""
    found = model.state_dict()
    if CHECKPOINTS[cell.family].kind == "vision":
        cell.weights = len(found)
        return
    numbers = ROUTES[cell.route].numbers if cell.route in ROUTES else FLOAT
    allowed = {FLOAT: 1e-6, HALF: 1e-3}.get(numbers, STEP["int4" if "int4" in cell.route else "int8"])
    own = own_weights(files.root, cell.family)
    scale = change_of(cell.family, cell.route).embed_scale
    if scale is not None:
        own = {**own, "embed.W_E": own["embed.W_E"] * np.float32(scale / model.cfg.d_model**0.5)}
    if lacking := own.keys() - found.keys():
        cell.failures.append(f"{len(lacking)} of {len(own)} weights are missing: {', '.join(sorted(lacking)[:3])} ...")
    for name in own.keys() & found.keys():
        share = difference(np.asarray(found[name]), own[name], None, name, f"the weight {name}")
        cell.weights += 1
        if not share <= allowed:
            cell.failures.append(f"the weight {name} differs by {share:.1e}")


@cache
def own_weights(files_root: Path, family: str) -> Mapping[str, np.ndarray]:
    """The weights of graphlens's own export, by TransformerLens's names; without masks and tables that no one trains."""
    weights = opened(Files(files_root).own(family), family).state_dict()
    return {name: np.asarray(value) for name, value in weights.items()}


def run_case(model: Any, family: str, case: str) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """The logits and the activations of a case in our model."""
    arguments, options = arguments_of(family, case)
    if case not in PAST:
        return model.run_with_cache(*arguments, **options)  # type: ignore[no-any-return]
    (tokens,) = arguments
    kept = graphlens.KeyValueCache.init_cache(model.cfg, batch_size=len(tokens))
    model(tokens[:, : PAST[case]], past_kv_cache=kept)
    return model.run_with_cache(tokens[:, PAST[case] :], past_kv_cache=kept)  # type: ignore[no-any-return]


def difference(
    found: np.ndarray, reference: np.ndarray, real: np.ndarray | None, name: str, what: str, numbers: str = FLOAT
) -> float:
    """max|found - reference| / max(1, max|reference|) over the positions of real tokens.

    A masked score is -inf here; other tools have a large negative number there, or -inf.
    """
    assert found.shape == reference.shape, f"{what}: {found.shape} instead of {reference.shape}"
    found, reference = found.astype(np.float64), reference.astype(np.float64)
    if real is not None:
        if name.endswith(("hook_attn_scores", "hook_pattern")):  # [b, h, q, k]
            found, reference = (array.swapaxes(1, 2)[real] for array in (found, reference))
        else:
            if found.shape[0] != len(real):  # of norms of heads: batch, positions and heads in one axis
                shape = (*real.shape, -1, *found.shape[1:])
                found, reference = found.reshape(shape), reference.reshape(shape)
            found, reference = found[real], reference[real]
    masked = np.isneginf(reference)
    if masked.any():
        assert (found[masked] < -5e3).all() or numbers == QUANTISED, (
            f"{what}: masked scores are up to {found[masked].max()}"
        )
    kept = reference[~masked]
    return float(np.abs(found[~masked] - kept).max() / max(1.0, np.abs(kept).max())) if kept.size else 0.0


def _compare_edits(cell: Cell, model: Any, files: Files, _path: Path, every: bool) -> None:
    """Edits beside the same edits in transformers, and the three ways of making one beside each other."""
    numbers = ROUTES[cell.route].numbers if cell.route in ROUTES else FLOAT
    arguments, options = arguments_of(cell.family, "plain")
    hooks = [name for name in _wanted(files, cell.family) if name in set(model.hook_points())]
    if numbers != QUANTISED:
        possible = set(oracle_of(files.root, cell.family, cell.route).editable())
        chosen = [name for name in hooks if name in possible and (every or not (".0." in name or ".2." in name))]
        worst, where = 0.0, ""
        for name in chosen:
            edited = _python_hook(model, arguments, options, name, lambda value, name=name: edit_of(name, value))
            reference = expected_edit(files.root, cell.family, name, cell.route)
            share = difference(edited, reference, None, name, f"an edit at {name}")
            if not share <= worst:
                worst, where = share, name
        cell.edits, cell.edit = len(chosen), worst
        if not worst <= _allowed(cell):
            cell.failures.append(f"an edit at {where} differs from transformers' by {worst:.1e}")
    for hook, intervention, function in three_ways(hooks, model.cfg.d_model):
        read = hook if numbers == QUANTISED else None
        python = _python_hook(model, arguments, options, hook, _in_kind(function), read)
        data = _with_edit(model, arguments, options, intervention, read)
        folder = files.root / "adopted" / f"{cell.family}.{cell.route}.baked"
        shutil.rmtree(folder, ignore_errors=True)
        model.bake(intervention, folder, keep_hooks=True)
        baked = _logits(opened(folder, cell.family), arguments, options, read)
        plain = _logits(model, arguments, options, read)
        shutil.rmtree(folder, ignore_errors=True)
        held = np.asarray(model.run_with_cache(*arguments, names_filter=hook, **options)[1][hook])
        changed = difference(data, plain, None, hook, hook)
        if np.array_equal(_in_kind(function)(held), held):  # a quantiser that leaves nothing of it: 0 is ablated
            assert changed == 0, (
                f"{intervention}: it leaves the activation as it is, and the logits differ by {changed:.1e}"
            )
        else:
            assert changed > 1e-4, f"{intervention}: the edit changes nothing"
        for way, found in (("a Python hook", python), ("the baked file", baked)):
            share = difference(found, data, None, hook, hook)
            if not share <= SAME[numbers]:
                cell.failures.append(f"{intervention}: {way} differs from the data edit by {share:.1e}")


def _python_hook(
    model: Any,
    arguments: Any,
    options: Any,
    hook: str,
    function: Callable[[np.ndarray], np.ndarray],
    read: str | None = None,
) -> np.ndarray:
    """The logits with a Python hook that puts ``function`` of an activation in its place."""
    with model.hooks(fwd_hooks=[(hook, lambda activation, hook: function(activation))]):
        return _logits(model, arguments, options, read)


def _with_edit(model: Any, arguments: Any, options: Any, intervention: Intervention, read: str | None) -> np.ndarray:
    """The logits with an edit."""
    with model.intervene([intervention]):
        return _logits(model, arguments, options, read)


def _logits(model: Any, arguments: Any, options: Any, read: str | None) -> np.ndarray:
    """The logits of a run, of one that reads a hook point too where ``read`` names it.

    One that reads nothing runs a graph in which ONNX Runtime has joined other operators, so that last bits differ. A quantiser at
    the edge between two steps makes one of its own steps of that.
    """
    if read is None:
        return np.asarray(model(*arguments, **options))
    return np.asarray(model.run_with_cache(*arguments, names_filter=read, **options)[0])


def _in_kind(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A function that gives back numbers of the kind that it was given: of half precision in a half file."""
    return lambda value: function(value.astype(np.float32)).astype(value.dtype)


def three_ways(hooks: list[str], width: int) -> Iterator[tuple[str, Intervention, Callable[[np.ndarray], np.ndarray]]]:
    """Edits as (hook point, data, the same as a function), of those hook points that there are.

    Args:
        hooks: The file's hook points.
        width: The size of the residual stream.
    """
    direction = np.linspace(-1, 2, width, dtype=np.float32)  # a norm would take out one number for all

    def ablated(z: np.ndarray) -> np.ndarray:
        z = z.copy()
        z[:, :, 2] = 0
        return z

    def halved(post: np.ndarray) -> np.ndarray:
        post = post.copy()
        post[:, :, :7] *= np.float32(0.5)
        return post

    z, before = in_block(1, "attn.hook_z"), in_block(1, "hook_resid_pre")
    post, out = in_block(0, "mlp.hook_post"), in_block(0, "hook_mlp_out")
    wanted: list[tuple[str, Intervention, Callable[[np.ndarray], np.ndarray]]] = [
        (z, Ablate(z, heads=2), ablated),
        (before, Steer(before, vector=direction), lambda value: value + direction),
        (post, Scale(post, factor=0.5, dims=slice(0, 7)), halved),
        (out, Patch(out, value=direction), lambda value: np.broadcast_to(direction, value.shape).copy()),
    ]
    yield from (each for each in wanted if each[0] in hooks)


def _compare_scrambled(cell: Cell, model: Any, files: Files, path: Path, _every: bool) -> None:
    """The same file under other names: the same hook points, weights and architecture, the same numbers."""
    folder = files.root / "adopted" / f"{cell.family}.{cell.route}.scrambled"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    renamed = folder.with_suffix(".onnx")
    _scramble(path, renamed)
    config = files.checkpoint(cell.family) if CHECKPOINTS[cell.family].kind == "vision" else None
    report = graphlens.adopt(renamed, folder, config=config, announce=lambda _: None)
    other = opened(folder, cell.family)
    differ = set(other.hook_points()) ^ set(model.hook_points())
    assert not differ, f"scrambled: {', '.join(sorted(differ)[:4])} of {len(differ)} hook points are in one of both"
    assert list(other.hook_points()) == list(model.hook_points()), "scrambled: another firing order"
    own = {key: value for key, value in vars(model.runner.engine.manifest.config).items() if key != "model_name"}
    found = {key: value for key, value in vars(report.config).items() if key != "model_name"}
    assert own == found, f"scrambled: another config: {set(own.items()) ^ set(found.items())}"
    numbers = ROUTES[cell.route].numbers if cell.route in ROUTES else FLOAT
    case = "plain" if CHECKPOINTS[cell.family].kind == "vision" else "right"
    (logits, cache), (logits_too, cache_too) = (run_case(each, cell.family, case) for each in (model, other))
    for name, value in {"logits": logits, **cache}.items():
        again = logits_too if name == "logits" else cache_too[name]
        share = difference(np.asarray(again), np.asarray(value), None, name, f"scrambled {name}", numbers)
        assert share <= SAME[numbers], f"scrambled: {name} differs by {share:.1e}"
    weights, weights_too = model.state_dict(), other.state_dict()
    assert weights.keys() == weights_too.keys(), f"scrambled: other weights: {weights.keys() ^ weights_too.keys()}"
    for name, value in weights.items():
        assert np.array_equal(np.asarray(value), np.asarray(weights_too[name])), f"scrambled: {name} differs"
    shutil.rmtree(folder)
    renamed.unlink()


def _scramble(source: Path, target: Path) -> None:
    """Writes a file's copy with other names. It keeps what the file tells of its values' types and sizes, by number alone."""
    model = ir.load(source)
    model.graph.sort()  # of the float16 converter's files, the nodes are in an order in which they cannot run
    told = {value.name: value for node in model.graph for value in node.outputs}
    copy, old = scrambled(model)
    for node in copy.graph:
        for value in node.outputs:
            known = told.get(old[str(value.name)])
            if known is not None and value.type is None:
                value.type = known.type
            if known is not None and known.shape is not None and value.shape is None:
                value.shape = ir.Shape([size if isinstance(size, int) else None for size in known.shape])
    ir.save(copy, target)


def save_cell(cell: Cell, folder: Path) -> None:
    """Keeps a cell, so that a table can be written of several runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cell.family}.{cell.route}.json").write_text(json.dumps(asdict(cell), indent=1), "utf-8")


def saved_cells(folder: Path) -> list[Cell]:
    """The cells that were kept."""
    return [Cell(**json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("*.json"))]
