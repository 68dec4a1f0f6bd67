"""The same with tensors."""

from graphlens.torch import HookedTransformer

model = HookedTransformer.from_onnx("gpt2-hooked")
tokens = model.to_tokens("When John and Mary went to the store")
reveal_type(tokens)  # is Tensor
logits, cache = model.run_with_cache(tokens)
reveal_type(logits)  # is Tensor
reveal_type(cache["z", 0])  # is Tensor
reveal_type(model(tokens, return_type="loss"))  # is Tensor
reveal_type(model.W_E)  # is Tensor
reveal_type(model.eval())  # is HookedTransformer
