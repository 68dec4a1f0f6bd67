"""A user's script, as mypy --strict sees it. It is checked, not run; what follows ``# is`` is what has to be inferred."""

from graphlens import (
    Ablate,
    ActivationCache,
    FactoredMatrix,
    HookedTransformer,
    HookedTransformerConfig,
    KeyValueCache,
    Steer,
    bake_model,
    embedded_model,
    export_model,
    get_act_name,
    process_weights,
    write_adapter,
    write_drivable,
)
from graphlens.attribution import attribution_patch, compare_with_sweep
from graphlens.metrics import LogitDiff
from graphlens.patching import Site, get_act_patch_resid_pre, grid, sweep
from graphlens.utils import detect_head, lm_cross_entropy_loss

model = HookedTransformer.from_onnx(embedded_model())
reveal_type(model)  # is HookedTransformer[ndarray]
tokens = model.to_tokens("When John and Mary went to the store")
reveal_type(tokens)  # is ndarray
reveal_type(model(tokens))  # is ndarray
reveal_type(model(tokens, return_type="both"))  # is tuple[ndarray, ndarray, fallback=Output[ndarray]]
reveal_type(model(tokens, return_type=None))  # is None
logits, cache = model.run_with_cache(tokens, names_filter="blocks.0.attn.hook_z")
reveal_type(logits)  # is ndarray
reveal_type(cache)  # is ActivationCache[ndarray]
reveal_type(cache["z", 0])  # is ndarray
reveal_type(model.run_with_cache(tokens, return_cache_object=False)[1])  # is dict[str, ndarray]
reveal_type(model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook: x * 0)]))  # is ndarray
reveal_type(model.gradients(tokens, LogitDiff(" Mary", " John")))  # is Gradients[ndarray]
reveal_type(model.W_Q)  # is ndarray
reveal_type(model.blocks[0].attn.OV)  # is FactoredMatrix
reveal_type(model.cfg.n_layers)  # is int
toy = HookedTransformer(HookedTransformerConfig(n_layers=1, d_model=8, d_head=4, n_ctx=5, d_vocab=7))
reveal_type(toy)  # is HookedTransformer[ndarray]
reveal_type(toy.load_state_dict(model.state_dict()).missing_keys)  # is list[str]
reveal_type(model.to_single_token(" Mary"))  # is int
with model.intervene([Ablate("blocks.0.attn.hook_z", heads=1), Steer("blocks.1.hook_resid_pre", tokens)]) as edited:
    reveal_type(edited)  # is HookedTransformer[ndarray]
reveal_type(model.run_with_interventions(tokens, Ablate("hook_embed")))  # is ndarray
both = model.run_with_interventions(tokens, Ablate("hook_embed"), names_filter="hook_embed")
reveal_type(both)  # is tuple[ndarray, ActivationCache[ndarray]]
reveal_type(get_act_patch_resid_pre(model, tokens, cache, LogitDiff(" Mary", " John")))  # is ndarray
found = sweep(model, tokens, [Site("resid_pre", 0, position=1)], cache, LogitDiff(" Mary", " John"))
reveal_type(found)  # is SweepResult
estimate = attribution_patch(model, tokens, grid("z", ("layer",), {"layer": range(4)}), cache, LogitDiff(1, 2))
reveal_type(compare_with_sweep(estimate, found).correlation)  # is float
reveal_type(detect_head(model, "John and Mary", "previous_token_head"))  # is ndarray
reveal_type(lm_cross_entropy_loss(logits, tokens))  # is ndarray
reveal_type(get_act_name("z", 3))  # is str
reveal_type(bake_model(embedded_model(), Ablate("hook_embed"), "out"))  # is Path
reveal_type(KeyValueCache.init_cache(model.cfg, batch_size=1))  # is KeyValueCache
print(ActivationCache, FactoredMatrix, export_model, process_weights, write_adapter, write_drivable)
