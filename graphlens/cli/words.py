"""Errors in the words of the command line: what they advise to call in Python, as the option or command that does it.

Knows alone how an argument of the API is written as an option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# What an error of the API says -> what one types instead. In a replacement, \1 is a group of the pattern.
SAID: Mapping[str, str] = {
    r"List them with model\.hook_points\(\)\.": "graphlens hooks MODEL lists them.",
    r"list them with model\.hook_points\(\)\.": "graphlens hooks MODEL lists them.",
    r"exists only while the flag '(\w+)' is set: call model\.set_\w+\(True\) first\.": (
        r"exists only while the flag '\1' is set; graphlens bake alone sets it, where an edit names such a hook point."
    ),
    r"Pass allow_nonfinite=True if they are meant\.": 'Write "allow_nonfinite": true beside it if they are meant.',
    r"Pass strict=False to ignore what lies beyond the sequence": (
        'Write "strict": false beside it to ignore what lies beyond the sequence'
    ),
    r"pass token ids, not text, or give the model one with model\.set_tokenizer\(\.\.\.\)": (
        "give token ids (--ids), or a tokenizer (--tokenizer FOLDER)"
    ),
    r" There is stack_activation\('resid_pre'\), and stack_head_results\.": "",
    r"open it with graphlens\.\w+\.": "this command takes decoders; graphlens hooks, cache, run and report take all kinds.",
    r"Open it with graphlens\.HookedEncoder\.": "It is used as it is.",
    r"run it with return_type=None and read hook points \(run_with_cache\), or stop at a layer\.": (
        "graphlens hooks and graphlens cache read its hook points."
    ),
    r"generate with use_past_kv_cache=False, or adopt": "adopt",
    r"pass padding_side='right', or prompts of one length": "give prompts of one length",
    r"Pass some text, or prepend_bos=True\.": "Give some text, or --bos.",
    r"pass prepend_bos=False": "give --no-bos",
    r"\(with_past\)": "(--with-past)",
    r"\blayout '": "--layout '",
    r"^self_contained copies the weights, as is the default now, and link hardlinks them": (
        "--self-contained copies the weights, as is the default now, and --link hardlinks them"
    ),
    r"Pass force=True \(--force\) to replace it\.": "--force replaces it.",
    r"^like='": "--like '",
    r"\bn_ctx=(?=\d)": "--n-ctx ",
    r"Open it: HookedTransformer\.from_onnx\(\.\.\.\)\.": "It is used as it is: graphlens hooks, run and bake take it.",
    r"Open it with HookedTransformer\.from_onnx; there is nothing to adopt\.": "There is nothing to adopt.",
    r"Pass the model's config\.json \(--config\)\.": "Give the model's config.json (--config).",
    r"from_onnx and from_pretrained_no_processing open the file as it is\.": "It is used as it is.",
    r"Pass fold_ln=False\.": "Give --no-fold-ln.",
    r"Pass tokenizer=, or put": "Give one with --tokenizer, or put",
    r" or pass token=\.": ", and try again.",
    r": log in, or pass token=\)": ": log in with hf auth login)",
    r"Pass resume=True to go on with it, or choose": "--resume goes on with it; or choose",
    r"Go on with it: resume=True, or graphlens harvest --resume\.": "graphlens harvest --resume goes on with it.",
    r"name one with column=\.": "name one with --column.",
    r"\(too_long='split' or 'cut'\), or raise context\.": "(--too-long split or cut), or raise --context.",
    r"Leave it out, or use pack=True\.": "Leave it out, or use --pack.",
    r"use 'cpu', 'cuda', or a list of ONNX Runtime provider names\.": "it is 'cpu' or 'cuda'.",
}


def in_words_of_commands(text: str) -> str:
    """An error, warning or line of text of the API, as the command line says it.

    >>> in_words_of_commands("gpt2: holds an export already. Pass force=True (--force) to replace it.")
    'gpt2: holds an export already. --force replaces it.'

    Args:
        text: What the API says.
    """
    for pattern, instead in SAID.items():
        text = re.sub(pattern, instead, text)
    return text
