"""What commands that show a run take: a text for a decoder or an encoder, a file of images for a vision model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from graphlens.cli.options import Read, is_hooked, place_of, read_text, tokenizer_of, with_tokenizer
from graphlens.errors import InputError
from graphlens.file.folder import user_path

if TYPE_CHECKING:
    from graphlens.analysis.arrays import Array
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.hooked_vit import HookedViT

    Opened: TypeAlias = "HookedTransformer | HookedEncoder | HookedViT"


@dataclass(frozen=True)
class Images:
    """Images that a command was given.

    Attributes:
        pixels: Float [b, channels, height, width], as the model's image processor makes them.
    """

    pixels: Array

    @property
    def used(self) -> str:
        """How many there are, for people."""
        return f"{len(self.pixels)} image{'s' if len(self.pixels) > 1 else ''}"


def open_any(model: str, provider: str | None = None, tokenizer: str | None = None) -> Opened:
    """Opens a model with unprocessed weights, as what it is.

    Args:
        model: A hooked folder or file, a checkpoint folder, a hub name, or an embedded model's name.
        provider: "cpu" or "cuda"; None takes CUDA where it works.
        tokenizer: A folder or hub name whose tokenizer is taken in place of the model's own.

    Raises:
        InputError: There is no tokenizer there, one of more tokens than the model has, or the model runs images.
    """
    from graphlens.engine.engine import Engine
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.hooked_vit import HookedViT
    from graphlens.pipelines.cache import cached_export
    from graphlens.views.progress import spinner

    other = tokenizer_of(tokenizer)
    path = user_path(place_of(model))
    if not is_hooked(path):
        path = cached_export(model, processing=())
    with spinner(f"Opening {path}"):
        engine = Engine(path, provider)
    config = engine.manifest.config
    if config.is_vision:
        if other is not None:
            raise InputError(f"--tokenizer: {config.model_name} runs images, which need none. Leave it out.")
        return HookedViT(engine)
    return with_tokenizer(HookedEncoder(engine) if config.is_encoder else HookedTransformer(engine), other, tokenizer)


def read_any(model: Opened, what: str, prompt: str, bos: bool | None, strict: bool, ids: bool = False) -> Read | Images:
    """What a model is to run: a text as tokens, or the images of a file.

    Args:
        model: The model.
        what: How a message calls it: "the prompt".
        prompt: The text; of a vision model a .npy file.
        bos: Whether a text gets a BOS token; None for what the model does.
        strict: True makes a text too long an error.
        ids: True reads token ids though there is a tokenizer.

    Raises:
        InputError: As ``read_text`` does; for a file that holds no images, and options of texts with it.
    """
    from graphlens.model.hooked_vit import HookedViT

    if not isinstance(model, HookedViT):
        return read_text(model, what, prompt, bos, strict, ids)
    if ids or bos is not None:
        raise InputError(f"{'--ids' if ids else '--bos'} is for texts, and {model.cfg.model_name} runs images.")
    return Images(_images(model, what, prompt))


def _images(model: HookedViT, what: str, name: str) -> Array:
    """The images of a file. Raises InputError for something else."""
    import numpy as np

    says = (
        f"{model.cfg.model_name} is a vision model: give a .npy file in place of {what}, with images as its image processor "
        "makes them, float [batch, channels, height, width]"
    )
    path = user_path(name)
    if path.suffix != ".npy" or not path.is_file():
        raise InputError(f"{says}; {name!r:.60} is no such file.")
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as an array ({error}).") from error
    if pixels.ndim not in (3, 4) or pixels.dtype.kind != "f" or not pixels.size:
        raise InputError(f"{says}; {path.name} holds {pixels.dtype} {list(pixels.shape)}.")
    images: Array = pixels if pixels.ndim == 4 else pixels[None]
    return images


def masked_places(model: HookedEncoder, read: Read) -> list[int]:
    """The positions of the masked tokens of a prompt. Raises InputError where there is none, or no mask token is known."""
    tokenizer = model.runner.text.tokenizer
    mask = None if tokenizer is None else tokenizer.mask_token_id
    if mask is None:
        raise InputError(
            f"{model.cfg.model_name} predicts masked tokens, and no tokenizer says which token is the mask: --tokenizer FOLDER "
            "gives one. graphlens cache reads its activations without one."
        )
    found = [int(place) for place in (read.tokens[0] == mask).nonzero()[0]]
    if not found:
        sign = model.runner.text.of_each([mask])[0]
        raise InputError(f"{model.cfg.model_name} predicts masked tokens, and there is none: put {sign} in the prompt.")
    return found


def likely(logits: Array, top: int) -> list[tuple[int, float]]:
    """The likeliest tokens or classes.

    Args:
        logits: Float [V].
        top: How many.

    Returns:
        (number, its probability) of each, the likeliest first.
    """
    import numpy as np

    from graphlens.analysis.numerics import softmax

    shares = softmax(logits)
    return [(int(i), float(shares[i])) for i in np.argsort(-shares)[:top]]
