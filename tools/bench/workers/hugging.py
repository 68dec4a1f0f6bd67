"""transformers, with the attention it takes by default."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from tools.bench.workers.protocol import Job, Work, logits_check, opened_twice


def load(checkpoint: str, **options: Any) -> Any:
    """The checkpoint as a transformers model, ready to be run."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()
    return model.requires_grad_(False)


def some_tokenizer() -> Any:
    """A tokenizer for libraries that want one, where token ids are all that they are given: none of those is its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"none": 10**7}, unk_token="none"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="none", unk_token="none", bos_token="none", eos_token="none"
    )


def head_slice(model: Any, head: int) -> slice:
    """Where a head's output lies in what the block's projection reads, and in the rows of its weight."""
    width = model.config.n_embd // model.config.n_head
    return slice(head * width, (head + 1) * width)


def load_without_head(checkpoint: str, layer: int, head: int) -> Any:
    """The model with one head's rows of the output projection at zero."""
    model = load(checkpoint)
    model.transformer.h[layer].attn.c_proj.weight[head_slice(model, head)] = 0
    return model


@contextlib.contextmanager
def hooked(module: Any, function: Any) -> Iterator[None]:
    """The module with a hook on what it is given, for the block."""
    handle = module.register_forward_pre_hook(function)
    try:
        yield
    finally:
        handle.remove()


def prepare(job: Job) -> Work:
    """The works that transformers alone can do."""
    import torch

    ids = torch.tensor(job.tokens)

    def logits_of(model: Any) -> Any:
        with torch.inference_mode():
            return model(ids).logits

    if job.work == "two_variants":
        return opened_twice(partial(load_without_head, job.checkpoint, job.layer), logits_of)
    model = load(job.checkpoint)
    projection, head = model.transformer.h[job.layer].attn.c_proj, head_slice(model, 0)

    def filtered() -> Any:
        with torch.inference_mode():
            found = model(ids, output_hidden_states=True)
        return found.logits, found.hidden_states[:-1]  # the last one is after ln_final

    def scale(module: Any, given: Any) -> Any:
        return (given[0] * 0.5,)

    def zero(module: Any, given: Any) -> Any:
        z = given[0].clone()
        z[..., head] = 0
        return (z,)

    def with_hook(function: Any) -> Any:
        with hooked(projection, function):
            return logits_of(model)

    def generate() -> Any:
        model.generation_config.eos_token_id = None  # never stop early
        with torch.inference_mode():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.new_tokens, do_sample=False, pad_token_id=0
            )

    return {
        "forward": Work(partial(logits_of, model), logits_check),
        "filtered_cache": Work(
            filtered, lambda r: logits_check(r[0]) | {"last resid_pre": r[1][-1][0, -1, :8].tolist()}
        ),
        "one_hook": Work(partial(with_hook, scale), logits_check),
        "edit": Work(partial(with_hook, zero), logits_check),
        "generation": Work(generate, lambda tokens: {"tokens": tokens[0, -job.new_tokens :].tolist()}),
    }[job.work]
