"""Train an embedded model from nothing and write it to its folder, ``models/tiny-gpt2`` or ``models/tiny-llama``.

    python tools/train_tiny.py [--architecture gpt2|llama] [--steps N] [--seed S] [--out FOLDER]

Everything is seeded: the same architecture, seed, steps, thread count and library versions on the same kind of machine
give the same files, byte for byte. Needs torch, transformers and tokenizers; tiny-gpt2 takes some 13 minutes on two
cores (AMD EPYC; it prints the time).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tiny_ioi import FILLERS, classic_prompts, ioi_document
from tiny_stories import sample_story
from tiny_words import EOT, NAMES, NUMBERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

MODELS = Path(__file__).resolve().parent.parent / "models"


def build_gpt2(recipe: Recipe, end_id: int) -> GPT2LMHeadModel:
    """A freshly initialised GPT-2 with four layers of four heads, and no dropout."""
    config = GPT2Config(
        vocab_size=recipe.vocab_size,
        n_positions=recipe.context,
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_inner=512,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    return GPT2LMHeadModel(config)


def build_llama(recipe: Recipe, end_id: int) -> LlamaForCausalLM:
    """A freshly initialised Llama with four layers of four heads, which share two key-value heads.

    Its first head begins by attending to the token before (``attend_to_previous``).
    """
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        max_position_embeddings=recipe.context,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.06,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    model = LlamaForCausalLM(config)
    config.pad_token_id = end_id  # not before: a Llama gives the embedding of its padding token no gradient
    attend_to_previous(model, config.initializer_range)
    return model


def attend_to_previous(model: LlamaForCausalLM, common: float) -> None:
    """Lets the first head of the first layer begin with its attention on the token before.

    That is the first half of induction. GPT-2 soon finds it in its learned positions; a Llama, which has no biases in
    its queries and keys, was still without it after a thousand steps. So all embeddings begin with ``common`` added to
    each entry, and this head's query and key read that common part alone: they are equal but for one step of rotation, in
    the five fastest of the rotations, which alone tell neighbours apart.
    """
    width, attention = model.config.hidden_size, model.model.layers[0].self_attn
    common_part = torch.full((width,), width**-0.5)
    step = model.model.rotary_emb.inv_freq
    fast = (torch.arange(len(step)) < 5).float()
    query = torch.cat([fast, torch.zeros_like(fast)])
    key = torch.cat([fast * step.cos(), fast * step.sin()])
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(common)
        attention.q_proj.weight[: len(query)] = 0.72 * torch.outer(query, common_part)
        attention.k_proj.weight[: len(key)] = 0.72 * torch.outer(key, common_part)


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights. Lengths are in tokens; ``repeat_share`` is of rows, ``story_share`` of documents."""

    seed: int = 1
    steps: int = 6000
    batch: int = 32
    row: int = 64
    context: int = 128
    vocab_size: int = 800
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    names_steps: int = 500
    long_steps: int = 600
    early_repeat_share: float = 0.5
    repeat_share: float = 0.3
    repeat_min: int = 4
    repeat_max: int = 30
    story_share: float = 0.3
    threads: int = 2
    build: Callable[[Recipe, int], PreTrainedModel] = build_gpt2


LLAMA_RECIPE = Recipe(steps=5500, batch=16, names_steps=800, early_repeat_share=0.9, threads=1, build=build_llama)
# By architecture. Both models are trained on text from the same source, and share a tokenizer.
RECIPES = {"gpt2": Recipe(), "llama": LLAMA_RECIPE}
DEFAULT = "gpt2"


def model_dir(architecture: str) -> Path:
    """The folder of the embedded model of that architecture."""
    return MODELS / f"tiny-{architecture}"


def train_tokenizer(recipe: Recipe, documents: int = 6000) -> Tokenizer:
    """A GPT-2 style byte-level BPE tokenizer fitted to the training text, with ``EOT`` as id 0."""
    rng = random.Random(recipe.seed)
    texts = [make(rng) for _ in range(documents) for make in (sample_story, ioi_document)]
    # Names, numbers and the words of prompts are worth one token each, whatever their share of the text: "told" as "to"
    # and "ld" would make every later "to" look like its beginning.
    texts += ["".join(f" {word}" for word in (*NAMES, *NUMBERS, *FILLERS))] * documents
    texts += [example.prompt for example in classic_prompts()] * (documents // 4)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Assert what users rely on: names and the classic prompts' words are one token each, and any text round-trips."""
    prompts = " ".join(example.prompt.removeprefix("When") for example in classic_prompts()).replace(",", "").split()
    words = [" " + word for word in (*NAMES, *NUMBERS, *FILLERS, *prompts)] + ["When", EOT]
    split = [word for word in words if len(tokenizer.encode(word).ids) != 1]
    assert not split, f"not one token each: {split}"
    odd = "Zo\u00eb  paid 5 \u20ac\n\u732b\u0000\t~"
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


def end_token_id(tokenizer: Tokenizer) -> int:
    """The id of ``EOT``."""
    end_id = tokenizer.token_to_id(EOT)
    assert end_id is not None
    return end_id


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json that ``AutoTokenizer`` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_prefix_space": False,
        "bos_token": EOT,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOT,
        "model_max_length": context,
        "pad_token": EOT,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": EOT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def training_batches(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """One batch of rows of ids per step, each row starting with ``EOT``.

    Some of the rows are a random sequence said over and over, the others are packed with documents. In the first
    ``names_steps`` half of them are, and of names alone: with forty tokens to copy instead of hundreds, the heads that
    look a token up appear within a few hundred steps, and then spread to all tokens; without this start the loss stays
    on a plateau for thousands. In the last ``long_steps`` rows are twice as long and half as many, so that every
    position is trained.
    """
    rng = random.Random(recipe.seed + 1)
    end_id = end_token_id(tokenizer)
    names = [tokenizer.encode(f" {name}").ids[0] for name in NAMES]
    every = [i for i in range(recipe.vocab_size) if i != end_id]
    words = [i for i in every if len(tokenizer.decode([i])) > 1]
    for step in range(recipe.steps):
        early, long = step < recipe.names_steps, step >= recipe.steps - recipe.long_steps
        length = recipe.context if long else recipe.row
        rows = []
        for _ in range(recipe.batch // 2 if long else recipe.batch):
            if rng.random() < (recipe.early_repeat_share if early else recipe.repeat_share):
                draw = rng.random()
                pool = names if early or draw < 0.25 else words if draw < 0.7 else every
                period = rng.randint(recipe.repeat_min, recipe.repeat_max * (2 if long else 1) if not early else 20)
                sequence = rng.choices(pool, k=period)
                row = [end_id, *sequence * (length // period + 1)]
            else:
                row = []
                while len(row) < length:
                    story = rng.random() < (0.1 if early else recipe.story_share)
                    text = sample_story(rng) if story else ioi_document(rng)
                    row += [end_id, *tokenizer.encode(text).ids]
            rows.append(row[:length])
        yield rows


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def train(recipe: Recipe, tokenizer: Tokenizer) -> PreTrainedModel:
    """Train for ``recipe.steps`` steps of ``batch * row`` tokens, printing the running loss in nats per token."""
    torch.manual_seed(recipe.seed)
    model = recipe.build(recipe, end_token_id(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    started = time.perf_counter()
    running = 0.0
    for step, batch in enumerate(training_batches(recipe, tokenizer)):
        ids = torch.tensor(batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}/{recipe.steps}  loss {running:.3f}  {seconds:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    """Train and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", choices=RECIPES, default=DEFAULT, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--seed", type=int, help="(default: the recipe's)")
    parser.add_argument("--out", type=Path, help="folder to write (default: the embedded model's)")
    arguments = parser.parse_args()
    given = {name: value for name in ("steps", "seed") if (value := getattr(arguments, name)) is not None}
    recipe = replace(RECIPES[arguments.architecture], **given)
    logging.set_verbosity_error()  # padding and beginning share a token here, which it warns about at every start
    logging.disable_progress_bar()
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    folder: Path = arguments.out or model_dir(arguments.architecture)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(recipe)
    model = train(recipe, tokenizer)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone otherwise
    save_tokenizer(tokenizer, folder, recipe.context)
    print(f"wrote {folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
