"""nnsight over the transformers model. Its tracer reads the source of each ``with`` block below."""

from __future__ import annotations

from typing import Any

from tools.bench.workers import hugging
from tools.bench.workers.protocol import Job, Work, logits_check


def prepare(job: Job) -> Work:
    """The works that nnsight's tracing can do."""
    import torch
    from nnsight import LanguageModel

    plain = hugging.load(job.checkpoint)
    plain.generation_config.eos_token_id = None  # never stop early
    head = hugging.head_slice(plain, 0)
    model = LanguageModel(plain, tokenizer=hugging.some_tokenizer())
    ids, layers, layer = torch.tensor(job.tokens), range(plain.config.n_layer), job.layer

    def forward() -> Any:
        with torch.inference_mode(), model.trace(ids):
            logits = model.lm_head.output.save()
        return logits

    def filtered() -> Any:
        with torch.inference_mode(), model.trace(ids):
            kept = list().save()  # type: ignore[attr-defined]  # noqa: C408
            for index in layers:
                kept.append(model.transformer.h[index].input)
            logits = model.lm_head.output.save()
        return logits, kept

    def one_hook() -> Any:
        with torch.inference_mode(), model.trace(ids):
            z = model.transformer.h[layer].attn.c_proj.input
            model.transformer.h[layer].attn.c_proj.input = z * 0.5
            logits = model.lm_head.output.save()
        return logits

    def edit() -> Any:
        with torch.inference_mode(), model.trace(ids):
            model.transformer.h[layer].attn.c_proj.input[..., head] = 0
            logits = model.lm_head.output.save()
        return logits

    def generation() -> Any:
        options = {"max_new_tokens": job.new_tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode(), model.generate(ids, **options) as tracer:
            tokens = tracer.result.save()
        return tokens

    return {
        "forward": Work(forward, logits_check),
        "filtered_cache": Work(
            filtered, lambda r: logits_check(r[0]) | {"last resid_pre": r[1][-1][0, -1, :8].tolist()}
        ),
        "one_hook": Work(one_hook, logits_check),
        "edit": Work(edit, logits_check),
        "generation": Work(generation, lambda tokens: {"tokens": tokens[0, -job.new_tokens :].tolist()}),
    }[job.work]
