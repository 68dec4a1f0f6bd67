"""On a CUDA GPU: forward, caches and edits beside a bare CUDA session and transformers in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tools.bench.harness import Case, Findings, Row, Setup, Standin, rounds, timed, token_ids

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SIZES = [(1, 16), (8, 128), (8, 512)]


def session(path: str) -> Any:
    """A bare session on the GPU that computes float32 as float32: see graphlens.runtime.providers."""
    import onnxruntime

    onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    asked = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    made = onnxruntime.InferenceSession(path, options, providers=asked)
    if made.get_providers()[0] != "CUDAExecutionProvider":
        raise SystemExit("on_gpu needs onnxruntime-gpu and a CUDA GPU: the session fell back to the CPU.")
    return made


def in_torch(model: Standin) -> Callable[[npt.NDArray[np.int64]], Any]:
    """transformers' forward on the GPU, float32 without TensorFloat-32, from and to NumPy."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    torch_model: Any = AutoModelForCausalLM.from_pretrained(model.checkpoint, dtype=torch.float32).to("cuda").eval()

    @torch.no_grad()
    def forward(ids: npt.NDArray[np.int64]) -> Any:
        return torch_model(torch.from_numpy(ids).to("cuda"), use_cache=False).logits.cpu().numpy()

    return forward


def run(setup: Setup) -> Findings:
    """Milliseconds a call, at each size; results are NumPy arrays on the host on all sides."""
    import numpy as np

    from graphlens import Ablate, HookedTransformer

    model = HookedTransformer.from_onnx(str(setup.model.hooked), "cuda")
    layer = min(5, model.cfg.n_layers - 1)
    z = f"blocks.{layer}.attn.hook_z"
    bare, hooked = session(str(setup.model.stripped)), session(f"{setup.model.hooked}/model.onnx")
    outputs = [output.name for output in hooked.get_outputs()]
    torch_forward = in_torch(setup.model)
    rows, notes = [], []
    for batch, length in SIZES:
        ids = token_ids(model.cfg, batch, min(length, model.cfg.n_ctx))
        feeds, size = {"input_ids": ids}, f"b{batch} s{ids.shape[1]}"
        ours: dict[str, Callable[[], Any]] = {
            "forward": partial(model.forward, ids),
            "one activation cached": partial(model.run_with_cache, ids, names_filter=z),
            "an edit": partial(model.run_with_interventions, ids, [Ablate(z, heads=[0])]),
        }
        floor = partial(bare.run, ["logits"], feeds)
        contenders = {"floor": timed(floor), **{name: timed(work) for name, work in ours.items()}}
        contenders["transformers"] = timed(partial(torch_forward, ids))
        found = rounds(contenders, setup.repeats, warmup=3)
        rows += [Row(f"{size}, {name}", "ms", found[name], found["floor"]) for name in [*ours, "transformers"]]
        everything = {"floor": partial(hooked.run, outputs, feeds), "ours": partial(model.run_with_cache, ids)}
        fetched = rounds({name: timed(work) for name, work in everything.items()}, max(3, setup.repeats // 3))
        rows.append(Row(f"{size}, every hook point (floor: fetched bare)", "ms", fetched["ours"], fetched["floor"]))
        right = floor()[0]
        far = [float(np.abs(found - right).max()) for found in (model(ids), torch_forward(ids))]
        notes.append(f"{size}: logits differ from the floor's by {far[0]:.0e}, transformers' by {far[1]:.0e}.")
    return Findings(rows, "bare CUDA InferenceSession on the stripped file, logits fetched to the host", tuple(notes))


CASE = Case(run, repeats=15)
