"""What TransformerLens has and graphlens has not, each with the reason: for those who import it, and for the documentation."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NoReturn

from graphlens.errors import RuntimeUnavailable

LAYOUT = "graphlens.transformer_lens"
_BRIDGE = (
    "it belongs to TransformerLens's bridge, which wraps a transformers model in torch modules; a graphlens model is a graph "
    "in a file"
)
_ONE_DEVICE = (
    "it splits a torch model over several GPUs; a graphlens session runs on one device, which providers= chooses"
)
_PARTS = (
    "the parts of a graphlens model are pieces of its graph, made with it: use model.embed, model.blocks[i].attn and so on, "
    "or build a whole model from a config"
)
_TORCH_FORWARD = "it is a step of TransformerLens's own forward in torch; here the forward is the graph"
# A name below transformer_lens, or a pattern of such names -> why it is not here. The first that fits counts.
REASONS: dict[str, str] = {
    "train*": (
        "graphlens does not train. Train the checkpoint with torch, then export it; weights are set with model.set_weights "
        "or model.load_state_dict"
    ),
    "HookedEncoderDecoder*": "encoder-decoder models (T5) are not exported: a hooked file is one stack of blocks",
    "HookedAudioEncoder*": "models of sound (HuBERT, wav2vec 2) are not exported: graphlens takes text models",
    "BertNextSentencePrediction*": (
        "an encoder is exported with its masked-language-model head; the next-sentence head is left out"
    ),
    "components*": _PARTS,
    "conversion_utils*": _BRIDGE,
    "factories*": f"it picks TransformerLens's torch modules for a config; {_PARTS}",
    "model_bridge*": _BRIDGE,
    "pretrained*": "checkpoints are read where they are exported: docs/families.md says how to add an architecture",
    "lit*": "the Learning Interpretability Tool's server needs a torch module; `graphlens demo` and the views show a model",
    "benchmarks*": "it compares TransformerLens's two kinds of models; graphlens verifies every export itself",
    "tools.analysis*": (
        "these work on the bridge's torch modules; graphlens.attribution and graphlens.patching have attribution patching, "
        "direct logit attribution, path patching and circuits"
    ),
    "tools*": "it keeps TransformerLens's list of models; docs/models.md has graphlens's",
}


def reason_for(name: str) -> str | None:
    """Why a name of TransformerLens's is not here; None where nothing says so.

    Args:
        name: The name below ``transformer_lens``, e.g. ``components.MLP``.
    """
    return next((reason for pattern, reason in REASONS.items() if fnmatchcase(name, pattern)), None)


def refuse(name: str, reason: str) -> NoReturn:
    """Says why a name is not here.

    Args:
        name: The name below ``transformer_lens``.
        reason: Why.

    Raises:
        RuntimeUnavailable: Always. It is an ImportError, as an import of what is not there has to be.
    """
    raise RuntimeUnavailable(f"transformer_lens.{name} is not in graphlens: {reason}.")


def refusing(module: str) -> Callable[[str], NoReturn]:
    """The ``__getattr__`` of a module of the layout, which is asked for what the module has not.

    Args:
        module: The module's ``__name__``.

    Returns:
        A function of an attribute's name. It raises RuntimeUnavailable with the reason for what TransformerLens has there,
        and AttributeError for anything else.
    """
    path = module.removeprefix(LAYOUT).removeprefix(".")

    def getattr_of_module(name: str) -> NoReturn:
        full = f"{path}.{name}" if path else name
        reason = None if name.startswith("_") else reason_for(full)
        if reason is not None:
            refuse(full, reason)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_of_module
