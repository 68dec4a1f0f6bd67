"""A hooked folder as data: names of hook points and graph inputs, manifest, weights, tokenizer, safe writing."""
