"""The same with tensors."""

from graphlens.torch import HookedTransformer, HookedTransformerConfig

model = HookedTransformer.from_onnx("gpt2-hooked")
tokens = model.to_tokens("When John and Mary went to the store")
reveal_type(tokens)  # is Tensor
logits, cache = model.run_with_cache(tokens)
reveal_type(logits)  # is Tensor
reveal_type(cache["z", 0])  # is Tensor
reveal_type(model(tokens, return_type="loss"))  # is Tensor
reveal_type(model.W_E)  # is Tensor
reveal_type(model.eval())  # is HookedTransformer
toy = HookedTransformer(HookedTransformerConfig(n_layers=1, d_model=8, d_head=4, n_ctx=5, d_vocab=7))
reveal_type(toy(tokens))  # is Tensor
reveal_type(toy.fold_value_biases(toy.state_dict())["embed.W_E"])  # is Tensor
