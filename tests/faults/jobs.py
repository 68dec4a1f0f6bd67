"""Everything that writes, as jobs: what lies in a folder before, what is done there, and what may be found afterwards.

They run in the forks of tests/faults/warmed.py, where torch, transformers and traced graphs are in memory already.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

import graphlens
from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer, deploy, interventions, metrics, surgery
from graphlens.engine import packed_weights
from graphlens.errors import InputError, ModelFileError
from graphlens.experiments import sweep as sweeps
from graphlens.patching import SweepResult
from graphlens.pipelines import page as pages
from graphlens.pipelines.cache import cached_export
from graphlens.surgery.files import load
from tests.foreign_decoder import VOCAB, decoder, forward, weights
from tests.live.page_models import PROGRAMS

ABSENT, OLD, NEW = "absent", "old", "new"
Z, RESID = "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"
TOKENS = np.random.default_rng(0).integers(0, 101, (2, 7))
CONFIG: dict[str, Any] = {
    **{"n_layer": 2, "n_head": 5, "n_embd": 40, "n_inner": 77, "vocab_size": 101, "n_positions": 33},
    **{"bos_token_id": 0, "eos_token_id": 0},
}
OLD_EDITS = [Steer(RESID, np.linspace(-1, 1, 40), 0.5), Ablate(Z, heads=1)]
NEW_EDITS = [Ablate(Z, heads=2), Patch(RESID, np.ones(40), positions=-1), Steer(RESID, np.linspace(0, 3, 40))]


SAE = graphlens.Sae.from_arrays(
    *(np.full(shape, value, np.float32) for value, shape in ((1, (40, 7)), (2, 7), (3, (7, 40)), (4, 40))), RESID
)


@dataclass(frozen=True)
class Job:
    """Something that writes.

    Attributes:
        prepare: Puts what it needs into an empty folder, from the folder of templates.
        run: Does it there.
        found: Says what is there: ABSENT, OLD or NEW. Raises whatever it meets where it is none of these.
        before: What is found before; afterwards it is this or NEW.
    """

    prepare: Callable[[Path, Path], None]
    run: Callable[[Path], object]
    found: Callable[[Path], str]
    before: str = ABSENT


# Templates


def make_templates(root: Path) -> None:
    """Two models as checkpoints in float32 and bfloat16, their exports, and their logits by transformers."""
    import torch
    import transformers

    expected = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(root / name)
            expected[name] = model(torch.from_numpy(TOKENS)).logits.numpy()
            half = model.to(torch.bfloat16)
            half.save_pretrained(root / f"{name}16")
            expected[f"{name}16"] = half.float()(torch.from_numpy(TOKENS)).logits.numpy()
        graphlens.export_model(root / name, root / f"hooked_{name}", verify=False, announce=quiet)
    np.savez(root / "expected.npz", **expected)
    # The export of one model beside the checkpoint of the other: what exporting again into this folder replaces.
    shutil.copytree(root / "a16", root / "mixed")
    graphlens.export_model(root / "mixed", root / "mixed", verify=False, announce=quiet)
    shutil.copyfile(root / "b16" / "model.safetensors", root / "mixed" / "model.safetensors")


def quiet(_: str) -> None:
    """Says nothing."""


def copies(**wanted: str) -> Callable[[Path, Path], None]:
    """Copies templates: name in the job's folder = name of the template."""

    def prepare(templates: Path, folder: Path) -> None:
        (folder / "cache").mkdir()
        shutil.copyfile(templates / "expected.npz", folder / "expected.npz")
        for name, template in wanted.items():
            shutil.copytree(templates / template, folder / name)

    return prepare


# What is there


def is_near(found: np.ndarray, wanted: np.ndarray) -> bool:
    """True for the same logits, computed elsewhere."""
    return found.shape == wanted.shape and bool(np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max())


def which(folder: Path, logits: np.ndarray, **names: str) -> str:
    """The state whose model gives these logits: state = name of the expected logits."""
    with np.load(folder / "expected.npz") as expected:
        states = [state for state, name in names.items() if is_near(logits, expected[name])]
    (state,) = states
    return state


def hooked(folder: Path, place: str, **names: str) -> str:
    """What a hooked folder holds. It is there where its graph is, and then every check passes."""
    path = folder / place
    if not (path / "model.onnx").exists():
        return ABSENT
    surgery.check(path)
    logits = HookedTransformer.from_onnx(path, "cpu")(TOKENS)
    assert is_near(plain_logits(path), logits)
    return which(folder, logits, **names)


def found_shared(folder: Path) -> str:
    """What ``save_pretrained`` left: a whole folder with its card, or nothing."""
    found = hooked(folder, "out", new="a")
    assert (found == ABSENT) == (not (folder / "out" / "README.md").exists())
    return found


def plain_logits(path: Path) -> np.ndarray:
    """The logits of a folder's graph by ONNX Runtime alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"input_ids": TOKENS})[0])


def plain(folder: Path, wanted: Callable[[Path], np.ndarray]) -> str:
    """What the folder ``out`` holds that has no hooks: nothing, or a model that gives the wanted logits."""
    if not (folder / "out").exists():
        return ABSENT
    assert is_near(plain_logits(folder / "out"), wanted(folder))
    return NEW


def of_a(folder: Path) -> np.ndarray:
    with np.load(folder / "expected.npz") as expected:
        return np.asarray(expected["a"])


def edited_a(folder: Path) -> np.ndarray:
    return np.asarray(HookedTransformer.from_onnx(folder / "in", "cpu").run_with_interventions(TOKENS, NEW_EDITS[::2]))


def found_processed(folder: Path) -> str:
    """Processed weights give the same predictions, and other logits."""
    if not (folder / "out").exists():
        return ABSENT
    surgery.check(folder / "out")
    logits, wanted = plain_logits(folder / "out"), of_a(folder)
    logits, wanted = (x - x.mean(-1, keepdims=True) for x in (logits, wanted))
    assert is_near(logits, wanted)
    return NEW


def found_edits(folder: Path) -> str:
    path = folder / "edits.json"
    if not path.exists():
        return ABSENT
    items = interventions.load(path)
    (state,) = [state for state, edits in ((OLD, OLD_EDITS), (NEW, NEW_EDITS), (NEW, NEW_EDITS[:1])) if items == edits]
    return state


def found_cached(folder: Path) -> str:
    hidden = [path for path in (folder / "cache").glob("hooked/*") if not path.name.startswith(".")]
    if not hidden:
        return ABSENT
    (path,) = hidden
    return hooked(path.parents[2], str(path.relative_to(folder)), new="b")


def found_packed(folder: Path) -> str:
    """A packed copy that is found is one that sessions open over, and compute the same."""
    packed = packed_weights.find(folder / "in" / "model.onnx")
    if packed is None:
        return ABSENT
    packed_weights.LEAST = 0
    model = HookedTransformer.from_onnx(folder / "in", "cpu")
    logits = model.run_with_interventions(TOKENS, Scale(Z, 1.0))
    assert is_near(logits, of_a(folder))
    assert packed_weights.find(folder / "in" / "model.onnx") is not None  # it was not refused and removed
    return NEW


@functools.cache
def whole_sweep() -> SweepResult:
    """The sweep of the job, not saved and in one go."""
    return sweep_job(None)


def found_sweep(folder: Path) -> str:
    if not (folder / "out" / "sweep.json").exists():
        return ABSENT
    held, whole = SweepResult.load(folder / "out" / "sweep"), whole_sweep()
    done = ~np.isnan(held.values)
    assert done.any()
    assert np.array_equal(held.values[done], whole.values[done])
    return NEW if done.all() else OLD


def found_results(*names: str) -> Callable[[Path], str]:
    """What a command keeps in ``out``."""

    def found(folder: Path) -> str:
        there = [name for name in names if (folder / "out" / f"{name}.json").exists()]
        for name in there:
            assert not np.isnan(SweepResult.load(folder / "out" / name).values).all()
        for picture in (folder / "out").glob("[!.]*.html"):
            assert picture.read_text(encoding="utf-8").rstrip().endswith(("</html>", "</div>"))
        return NEW if len(there) == len(names) else OLD if there else ABSENT

    return found


def found_adapter(folder: Path) -> str:
    path = folder / "out.onnx_adapter"
    if not path.exists():
        return ABSENT
    found = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    (array,) = (value.numpy() for value in found.values())
    assert is_near(array.ravel(), np.linspace(-1, 1, 40, dtype=np.float32) / 2)
    return NEW


# What is done


def sweep_job(save_to: Path | None) -> SweepResult:
    sweeps.SAVE_EVERY = -1.0  # after every step
    model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    tokens = np.asarray([[5, 17, 200, 3]])
    _, clean = model.run_with_cache(np.asarray([[5, 17, 9, 3]]))
    sites = [sweeps.Site("resid_pre", layer, position=position) for layer in (0, 2) for position in (2, 3)]
    metric = metrics.LogitDiff(5, 9)
    kept: dict[str, Any] = {} if save_to is None else {"save_to": save_to, "resume": True}
    return sweeps.sweep(model, tokens, sites, clean, metric, verbose=False, max_batch_tokens=1, recompute=False, **kept)


def run_sweep(folder: Path) -> None:
    sweep_job(folder / "out" / "sweep")


def command(*arguments: str) -> None:
    """A command of the terminal, in this process."""
    from graphlens.cli.app import main

    sys.argv = ["graphlens", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as ended:
            if ended.code == 1:
                raise InputError(said.getvalue()) from None
            if ended.code:
                raise AssertionError(said.getvalue()) from None


PAIR = [
    *("--clean", "When John and Mary went to the store, John gave a drink to"),
    *("--corrupted", "When John and Mary went to the store, Mary gave a drink to"),
    *("--answer", " Mary", "--wrong", " John"),
]


def run_attribute(folder: Path) -> None:
    command("attribute", "tiny-gpt2", *PAIR, "--sites", "mlp_out", "--sites", "resid_pre", "-o", str(folder / "out"))


def run_patch(folder: Path) -> None:
    out = ["-o", str(folder / "out"), "--picture", "html", "--resume"]
    command("patch", "tiny-gpt2", *PAIR, "--sites", "resid_pre", "--sites", "mlp_out", *out)


def run_pack(folder: Path) -> None:
    packed_weights.LEAST = 0
    assert packed_weights.make(folder / "in" / "model.onnx", 100_000) is not None


def run_packing(folder: Path) -> None:
    """Opens a second session, for which weights are packed where there is room; the numbers are the same without."""
    packed_weights.LEAST = 0
    model = HookedTransformer.from_onnx(folder / "in", "cpu")
    assert is_near(model.run_with_interventions(TOKENS, Scale(Z, 1.0)), of_a(folder))


def force(folder: Path) -> None:
    graphlens.export_model(folder / "b", folder / "out", verify=False, force=True, announce=quiet)


def run_adapter(folder: Path) -> None:
    deploy.write_adapter(folder / "in", OLD_EDITS[:1], folder / "out.onnx_adapter")


def clear_cache(folder: Path) -> None:
    command("cache-clear")


def with_cache(templates: Path, folder: Path) -> None:
    """A cache that holds an export."""
    shutil.copytree(templates / "hooked_b", folder / "cache" / "hooked" / "b-0123")
    (folder / "cache" / "packed").mkdir()
    shutil.copyfile(templates / "expected.npz", folder / "expected.npz")


def found_cleared(folder: Path) -> str:
    """Cleared is what a run of it makes; before, there is a whole export."""
    return OLD if found_cached(folder) == NEW else NEW


def lose_cache(folder: Path) -> None:
    """A model from the cache goes on, or says what it misses, when the cache is removed; opening it again makes it anew."""
    model = HookedTransformer.from_pretrained_no_processing(folder / "b")
    with np.load(folder / "expected.npz") as expected:
        wanted = expected["b"]
    assert is_near(model(TOKENS), wanted)
    shutil.rmtree(folder / "cache")
    assert is_near(model(TOKENS), wanted)  # its session is open
    try:
        edited = model.run_with_interventions(TOKENS, Scale(Z, 1.0))
    except ModelFileError:
        edited = wanted  # it says that its file is gone
    assert is_near(edited, wanted)
    assert is_near(HookedTransformer.from_pretrained_no_processing(folder / "b")(TOKENS), wanted)


def save_old(templates: Path, folder: Path) -> None:
    interventions.save(OLD_EDITS, folder / "edits.json")


def nothing(templates: Path, folder: Path) -> None:
    """An empty folder, and one in it for results."""
    (folder / "out").mkdir()


def foreign(templates: Path, folder: Path) -> None:
    """A file of another program."""
    decoder(folder / "model.onnx", external=True, seed=1)


def foreign_over_older(templates: Path, folder: Path) -> None:
    """The same, and an adopted folder of another file."""
    foreign(templates, folder)
    (folder / "before").mkdir()
    graphlens.adopt(decoder(folder / "before" / "model.onnx"), folder / "out", announce=quiet)


def adopt(force: bool) -> Callable[[Path], object]:
    return lambda folder: graphlens.adopt(folder / "model.onnx", folder / "out", force=force, announce=quiet)


def found_adopted(folder: Path) -> str:
    """Whose hooked folder ``out`` is, by its logits beside NumPy's. The original is whole."""
    ids = TOKENS % VOCAB
    onnx.checker.check_model(folder / "model.onnx")
    assert is_near(np.asarray(numpy_helper.to_array(_tensor(folder, "w4"))), weights(1)["w4"])
    if not (folder / "out" / "model.onnx").exists():
        return ABSENT
    surgery.check(folder / "out")
    logits = np.asarray(HookedTransformer.from_onnx(folder / "out", "cpu")(ids))
    (state,) = (state for state, seed in ((OLD, 0), (NEW, 1)) if is_near(logits, forward(ids, seed=seed)[0]))
    return state


def _tensor(folder: Path, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in onnx.load(folder / "model.onnx").graph.initializer if tensor.name == name)


def expose(folder: Path) -> None:
    graphlens.expose(folder / "model.onnx", "v9*", folder / "out" / "model.onnx")


def found_exposed(folder: Path) -> str:
    """Whether ``out`` has a copy of the file that returns more, whole."""
    if not (folder / "out" / "model.onnx").exists():
        return ABSENT
    made = onnx.load(folder / "out" / "model.onnx")
    assert len(made.graph.output) > len(onnx.load(folder / "model.onnx").graph.output)
    (weight,) = (tensor for tensor in made.graph.initializer if tensor.name == "w4")
    assert is_near(np.asarray(numpy_helper.to_array(weight)), weights(1)["w4"])
    return NEW


def make_page(write: Callable[..., Path], out: str) -> Callable[[Path], object]:
    """Writes a live page, on small files in place of the npm packages."""

    def run(folder: Path) -> None:
        with mock.patch.object(pages, "runtime_files", return_value=PROGRAMS):
            write(folder / "in", folder / out, announce=quiet)

    return run


def found_page(folder: Path) -> str:
    """Whether ``out`` is a page with every file that it asks for, whole."""
    if not (folder / "out").exists():
        return ABSENT
    page = (folder / "out" / "index.html").read_text()
    settings = json.loads(re.findall(r'id="settings">(.*)</script>', page)[0])
    assert {name: (folder / "out" / name).stat().st_size for name in settings["sizes"]} == settings["sizes"]
    assert (folder / "out" / "page.js").read_text().endswith("shown already\n")
    onnxruntime.InferenceSession(folder / "out" / "model" / "model.onnx")
    return NEW


def earlier_page(templates: Path, folder: Path) -> None:
    copies(**{"in": "hooked_a"})(templates, folder)
    (folder / "page.html").write_text("earlier")


def found_page_file(folder: Path) -> str:
    text = (folder / "page.html").read_text()
    assert text == "earlier" or (text.count("data-file=") == 5 and text.endswith("</html>\n"))
    return OLD if text == "earlier" else NEW


def export(name: str, out: str, **options: Any) -> Callable[[Path], object]:
    return lambda folder: graphlens.export_model(folder / name, folder / out, verify=False, announce=quiet, **options)


def found_sae(folder: Path) -> str:
    if not list((folder / "out").glob("*")):  # the folder for results was there before
        return ABSENT
    found = graphlens.Sae.from_folder(folder / "out")
    assert found.cfg.plain() == SAE.cfg.plain()
    assert all(np.array_equal(array, SAE.weights[name]) for name, array in found.weights.items())
    return NEW


JOBS: dict[str, Job] = {
    "clear the cache": Job(with_cache, clear_cache, found_cleared),
    "export": Job(copies(b="b"), export("b", "out"), lambda f: hooked(f, "out", new="b")),
    "export, converted": Job(copies(b="b16"), export("b", "out"), lambda f: hooked(f, "out", new="b16")),
    "export in place": Job(copies(b="b"), export("b", "b"), lambda f: hooked(f, "b", new="b")),
    "export in place again": Job(
        copies(b="mixed"), export("b", "b"), lambda f: hooked(f, "b", old="a16", new="b16"), OLD
    ),
    "export --force": Job(copies(b="b", out="hooked_a"), force, lambda f: hooked(f, "out", old="a", new="b"), OLD),
    "export into the cache": Job(copies(b="b"), lambda f: cached_export(f / "b"), found_cached),
    "save over another": Job(
        copies(b="hooked_b", out="hooked_a"),
        lambda f: surgery.save(load(f / "b"), f / "out"),
        lambda f: hooked(f, "out", old="a", new="b"),
        OLD,
    ),
    "save": Job(
        copies(b="hooked_b"), lambda f: surgery.save(load(f / "b"), f / "out"), lambda f: hooked(f, "out", new="b")
    ),
    "save_pretrained": Job(
        copies(**{"in": "hooked_a"}),
        lambda f: HookedTransformer.from_onnx(f / "in", "cpu").save_pretrained(f / "out"),
        found_shared,
    ),
    "bake": Job(
        copies(**{"in": "hooked_a"}),
        lambda f: graphlens.bake_model(f / "in", NEW_EDITS[::2], f / "out", announce=quiet),
        lambda f: plain(f, edited_a),
    ),
    "drivable": Job(
        copies(**{"in": "hooked_a"}),
        lambda f: deploy.write_drivable(f / "in", "*hook_z", f / "out", announce=quiet),
        lambda f: plain(f, of_a),
    ),
    "strip": Job(
        copies(**{"in": "hooked_a"}),
        lambda f: deploy.write_stripped(f / "in", f / "out", announce=quiet),
        lambda f: plain(f, of_a),
    ),
    "page": Job(copies(**{"in": "hooked_a"}), make_page(pages.write_page, "out"), found_page),
    "page in one file": Job(earlier_page, make_page(pages.write_page_file, "page.html"), found_page_file, OLD),
    "adopt": Job(foreign, adopt(force=False), found_adopted),
    "adopt --force": Job(foreign_over_older, adopt(force=True), found_adopted, OLD),
    "expose": Job(lambda _, f: decoder(f / "model.onnx", seed=1), expose, found_exposed),
    "adapter": Job(copies(**{"in": "hooked_a"}), run_adapter, found_adapter),
    "process": Job(
        copies(**{"in": "hooked_a"}),
        lambda f: surgery.process_weights(f / "in", f / "out"),
        found_processed,
    ),
    "pack": Job(copies(**{"in": "hooked_a"}), run_pack, found_packed),
    "edits": Job(nothing, lambda f: interventions.save(NEW_EDITS, f / "edits.json"), found_edits),
    "edits over others": Job(save_old, lambda f: interventions.save(NEW_EDITS, f / "edits.json"), found_edits, OLD),
    "edits without arrays": Job(
        save_old, lambda f: interventions.save(NEW_EDITS[:1], f / "edits.json"), found_edits, OLD
    ),
    "save an SAE": Job(nothing, lambda f: SAE.save(f / "out"), found_sae),
    "sweep": Job(nothing, run_sweep, found_sweep),
    "patch": Job(nothing, run_patch, found_results("resid_pre", "mlp_out")),
    "attribute": Job(nothing, run_attribute, found_results("resid_pre-estimate", "mlp_out-estimate")),
}
# Not to be killed: one removes the cache itself, one may write nothing.
SCENES: dict[str, Job] = {
    "pack in passing": Job(copies(**{"in": "hooked_a"}), run_packing, found_packed),
    "open without a cache": Job(copies(b="b"), lose_cache, found_cached),
}
