"""Runs models past their memory limit: random Llamas of any size, each opened in a process that may not have the memory.

``python -m tests.scale.streaming_check`` measures the large one: 6 GB of weights under 2.5 GB.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
_SHARD = 1_500_000_000  # bytes of a weights file, about
ROWS, LENGTH = 2, 64
TOLERANCE = 1e-5  # of the largest logit: ONNX Runtime multiplies by packed matrices in another order


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    width: int
    mlp: int
    heads: int
    key_heads: int
    vocabulary: int

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each weight's name in the checkpoint, and its sizes."""
        keys = self.width // self.heads * self.key_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.width)
        for layer in range(self.layers):
            block = f"model.layers.{layer}."
            for name, rows in (("q", self.width), ("k", keys), ("v", keys), ("o", self.width)):
                yield f"{block}self_attn.{name}_proj.weight", (rows, self.width)
            yield f"{block}mlp.gate_proj.weight", (self.mlp, self.width)
            yield f"{block}mlp.up_proj.weight", (self.mlp, self.width)
            yield f"{block}mlp.down_proj.weight", (self.width, self.mlp)
            yield f"{block}input_layernorm.weight", (self.width,)
            yield f"{block}post_attention_layernorm.weight", (self.width,)
        yield "model.norm.weight", (self.width,)
        yield "lm_head.weight", (self.vocabulary, self.width)


SMALL = Shape(layers=12, width=1024, mlp=2816, heads=16, key_heads=4, vocabulary=8192)  # 608 MB
LARGE = Shape(layers=32, width=2048, mlp=5632, heads=32, key_heads=8, vocabulary=16384)  # 6.0 GB


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Writes a random checkpoint, one weight after the other. Returns the bytes of its weights."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, sizes in shape.weights():
        if size > len(shards) * _SHARD:
            shards.append({})
        shards[-1][name] = sizes
        size += 4 * int(np.prod(sizes))
    random, places = np.random.default_rng(0), {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        made = {}
        for name, sizes in names.items():
            made[name] = random.standard_normal(sizes, np.float32)
            made[name] *= np.float32(0.02)
            if name.endswith("norm.weight"):
                made[name] += np.float32(1)
            places[name] = file
        save_file(made, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


@dataclass(frozen=True)
class Measured:
    """What a process took to run a model.

    Attributes:
        limited_by: What kept it from taking more: "cgroup", "RLIMIT_DATA" or "nothing".
        weights: Bytes of the model's weights.
        interpreter: Bytes resident after the imports.
        peak: Bytes resident at most.
        peak_anonymous: Bytes of them at most that lie in no file, by samples.
        seconds: What each plain run took.
    """

    limited_by: str
    weights: int
    interpreter: int
    peak: int
    peak_anonymous: int
    seconds: list[float]

    @property
    def beyond(self) -> int:
        """Bytes resident at most, without the interpreter and its libraries."""
        return self.peak - self.interpreter


def run_limited(folder: Path, limit: int | None, results: Path, **asked: Any) -> Measured:
    """Opens a hooked folder in a process of its own and runs it.

    Args:
        folder: The hooked folder.
        limit: Bytes that the process may take beyond its interpreter and libraries; None for as many as it likes.
        results: A file to write the results to: logits, some activations, an edited run, gradients.
        asked: ``rows`` and ``length`` of the prompts, ``runs``: how many plain runs, ``all``: False for plain runs alone,
            ``groups``: False to be limited by RLIMIT_DATA, ``max_memory``: other than ``limit``.
    """
    job = {"folder": str(folder), "limit": limit, "results": str(results), "group": f"graphlens-{uuid4().hex}", **asked}
    # RLIMIT_DATA counts the whole stack of every thread, of which they touch a few pages: small ones then.
    shell = ["sh", "-c", 'ulimit -s 512; exec "$@"', "sh"]
    command = [*shell, sys.executable, "-m", "tests.scale.streaming_check", json.dumps(job)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    for group, _ in _memory_groups(str(job["group"])):
        with contextlib.suppress(OSError):
            group.rmdir()
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def largest_difference(one: Path, other: Path) -> dict[str, float]:
    """How far the results of two processes lie apart, relative to the largest figure of each array."""
    with np.load(one) as first, np.load(other) as second:
        if set(first) != set(second):
            raise AssertionError(f"{sorted(first)} and {sorted(second)}")
        return {name: _apart(first[name], second[name]) for name in first}


def _apart(one: Any, other: Any) -> float:
    if one.shape != other.shape or not np.isfinite(one).all():
        return float("inf")
    return float(np.abs(one.astype(np.float64) - other).max() / max(np.abs(one).max(), 1e-30))


def rows(workdir: Path, shape: Shape = LARGE, limit: int = 2_500_000_000) -> list[dict[str, Any]]:
    """A model of 6 GB under 2.5 GB: what was measured, each beside what it may be.

    Args:
        workdir: An empty folder with room for the weights.
        shape: The model's sizes.
        limit: Bytes for the whole process.
    """
    folder, size = made(workdir, shape)
    found = run_limited(folder, limit - 100_000_000, workdir / "streamed.npz", runs=2, max_memory=limit // 2)
    lines: list[dict[str, Any]] = [
        {"what": f"{size / 1e9:.2f} GB of weights, peak memory, MB", "figure": found.peak / 1e6, "limit": limit / 1e6},
        {"what": "of it in no file, MB", "figure": found.peak_anonymous / 1e6, "limit": limit / 1e6},
        {"what": f"seconds for {ROWS} x {LENGTH} tokens", "figure": min(found.seconds), "limit": None},
    ]
    memory = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in memory if line.startswith("MemAvailable:"))
    if available > 3 * size:
        run_limited(folder, None, workdir / "whole.npz", runs=1)
        apart = largest_difference(workdir / "whole.npz", workdir / "streamed.npz")
        worst = max(apart, key=apart.__getitem__)
        lines.append({"what": f"largest difference ({worst})", "figure": apart[worst], "limit": TOLERANCE})
    for line in lines:
        line["holds"] = line["limit"] is None or line["figure"] <= line["limit"]
        line["limited_by"] = found.limited_by
    return lines


def made(workdir: Path, shape: Shape) -> tuple[Path, int]:
    """A hooked folder of these sizes, exported in a process of its own, and the bytes of its weights."""
    size = write_checkpoint(workdir / "checkpoint", shape)
    code = "import sys; from graphlens.pipelines.export import export_model as e; e(*sys.argv[1:], verify=False, link=True)"
    arguments = [sys.executable, "-c", code, str(workdir / "checkpoint"), str(workdir / "hooked")]
    subprocess.run(arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    return workdir / "hooked", size


# In the child


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    wanted = ("VmRSS", "VmHWM", "RssAnon", "VmData")
    return {key: int(line.split()[1]) * 1024 for line in lines for key in wanted if line.startswith(f"{key}:")}


def _limit(allowed: int, group_name: str, groups: bool) -> str:
    """Keeps this process from taking more than so many further bytes. Returns what does."""
    import resource

    for group, file in _memory_groups(group_name) if groups else ():
        with contextlib.suppress(OSError):
            group.mkdir()
            # What the libraries took stays counted where it was taken; what comes now, pages of files included, counts here.
            (group / file).write_text(str(allowed))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return "cgroup"
    resource.setrlimit(resource.RLIMIT_DATA, (_status()["VmData"] + allowed,) * 2)
    return "RLIMIT_DATA"


def _memory_groups(name: str) -> list[tuple[Path, str]]:
    """Memory cgroups of a name inside this process's own, and the file that limits each, of both versions of cgroups."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if "memory" in controllers.split(","):
                found.append((Path(f"/sys/fs/cgroup/memory{own}") / name, "memory.limit_in_bytes"))
            elif not controllers:
                found.append((Path(f"/sys/fs/cgroup{own}") / name, "memory.max"))
    return [(group, file) for group, file in found if (group.parent / "cgroup.procs").is_file()]


def _child(job: Mapping[str, Any]) -> Measured:
    import threading

    from graphlens import Ablate, HookedTransformer, LogitDiff

    # Once with the embedded model, so that every library is loaded.
    tiny = HookedTransformer.from_onnx(ROOT / "models" / "tiny-llama", "cpu")
    tiny(np.zeros((1, 4), np.int64))
    del tiny
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    interpreter = _status()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    limit, limited_by = job["limit"], "nothing"
    folder = Path(job["folder"])
    if limit is not None:
        for file in folder.glob("*.safetensors"):  # pages that are cached already would be counted for nobody
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        limited_by = _limit(limit, job["group"], job.get("groups", True))
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], _status()["RssAnon"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    model = HookedTransformer.from_onnx(folder, "cpu", max_memory=job.get("max_memory", limit))
    ids = np.random.default_rng(1).integers(0, model.cfg.d_vocab, (job.get("rows", ROWS), job.get("length", LENGTH)))
    seconds = []
    for _ in range(job.get("runs", 1)):
        began = time.perf_counter()
        logits = model(ids)
        seconds.append(time.perf_counter() - began)
    results = {"logits": logits[:, -4:]}
    if job.get("all", True):
        middle = model.cfg.n_layers // 2
        short = ids[:, :16]
        names = [f"blocks.{middle}.hook_resid_pre", f"blocks.{middle}.attn.hook_pattern"]
        _, cache = model.run_with_cache(short, names_filter=names)
        results |= {name: cache[name] for name in names}
        results["ablated"] = model.run_with_interventions(short, Ablate(f"blocks.{middle}.attn.hook_z", heads=1))[:, -1]
        seen = []
        model.run_with_hooks(short, fwd_hooks=[(names[0], lambda value, hook: seen.append(value[:, -1].copy()))])
        results["hooked"] = np.stack(seen)
        result = model.gradients(short, LogitDiff(1, 2), names[:1])
        results["gradient"] = result[names[0]]
    ended.set()
    watcher.join()
    np.savez(job["results"], **results)
    found = _status()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Measured(limited_by, size, interpreter, found["VmHWM"], peak[0], seconds)


def main() -> None:
    """The child's program, or the measurement of the large model."""
    if len(sys.argv) > 1:
        print(json.dumps(asdict(_child(json.loads(sys.argv[1])))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for line in rows(Path(folder)):
            print(line)


if __name__ == "__main__":
    main()
