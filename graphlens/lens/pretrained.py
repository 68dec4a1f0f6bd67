"""What there is to load, by TransformerLens's names: official names, aliases, and checkpoints of training."""

from __future__ import annotations

import functools
import re

from graphlens.errors import InputError, warn
from graphlens.export.families import aliases, nearest_names

# The steps at which checkpoints of Stanford's GPT-2s were kept, and of Pythia, whose first version lacks the early ones.
STANFORD_CRFM_CHECKPOINTS = [
    *range(0, 100, 10),
    *range(100, 2000, 50),
    *range(2000, 20000, 100),
    *range(20000, 400001, 1000),
]
PYTHIA_V0_CHECKPOINTS = [*range(1000, 143001, 1000)]
PYTHIA_CHECKPOINTS = [0, *(2**power for power in range(10)), *PYTHIA_V0_CHECKPOINTS]
# Models that are not on the hub: their weights have to be brought along.
NON_HF_HOSTED_MODEL_NAMES = ["llama-7b-hf", "llama-13b-hf", "llama-30b-hf", "llama-65b-hf"]


@functools.cache
def _aliases() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for alias, official in aliases().items():
        found.setdefault(official, []).append(alias)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


# TransformerLens's names of the models that graphlens exports: on the hub, what they are called besides, and in short.
# Other checkpoints of those architectures load by their names on the hub too.
MODEL_ALIASES: dict[str, list[str]] = _aliases()
OFFICIAL_MODEL_NAMES: list[str] = list(MODEL_ALIASES)
DEFAULT_MODEL_ALIASES: list[str] = [names[0] for names in MODEL_ALIASES.values()]


def make_model_alias_map() -> dict[str, str]:
    """Every name of OFFICIAL_MODEL_NAMES and MODEL_ALIASES, in small letters -> the official one."""
    return {name.lower(): official for official, others in MODEL_ALIASES.items() for name in (*others, official)}


def get_official_model_name(model_name: str) -> str:
    """The name on the Hugging Face hub of a model that TransformerLens has a name for.

    >>> get_official_model_name("gpt2-small")
    'gpt2'

    Args:
        model_name: An official name or an alias, in capitals or not.

    Raises:
        InputError: For a name that is neither, or of an architecture that graphlens does not export.
    """
    official = make_model_alias_map().get(model_name.lower()) if isinstance(model_name, str) else None
    if official is None:
        near = ", ".join(map(repr, nearest_names(str(model_name))))
        raise InputError(
            f"{model_name!r} is no name of TransformerLens's for a model that graphlens exports"
            f"{f'. Nearest: {near}' if near else ''}. OFFICIAL_MODEL_NAMES lists them; from_pretrained takes any other "
            "checkpoint of their architectures by its name on the hub, or a folder."
        )
    return official


def get_checkpoint_labels(model_name: str, **kwargs: str) -> tuple[list[int], str]:
    """The moments of training of which a model's weights were kept.

    Open one with ``from_pretrained(name, revision=...)``: "step1000" of a Pythia, "checkpoint-1000" of Stanford's GPT-2s.

    Args:
        model_name: An official name or an alias.
        **kwargs: Arguments of ``huggingface_hub.HfApi.list_repo_files``, for models whose list is on the hub.

    Returns:
        (numbers, what they count: "step" or "token").

    Raises:
        InputError: For a model without such checkpoints.
    """
    official = get_official_model_name(model_name)
    if official.startswith("stanford-crfm/"):
        return STANFORD_CRFM_CHECKPOINTS, "step"
    if official.startswith("EleutherAI/pythia"):
        if "v0" in official:
            return PYTHIA_V0_CHECKPOINTS, "step"
        warn("the Pythia models on the hub were trained anew in April 2023: names that end in '-v0' are those before.")
        return PYTHIA_CHECKPOINTS, "step"
    labels: list[int] = []
    if official.startswith("NeelNanda/"):
        from huggingface_hub import HfApi

        found = (re.match(r"checkpoints/.*_(\d+)\.pth", name) for name in HfApi().list_repo_files(official, **kwargs))
        labels = [int(match[1]) for match in found if match]
    if not labels:
        raise InputError(f"{official}: no checkpoints of its training are known.")
    return labels, "token" if labels[-1] > 1e9 else "step"
