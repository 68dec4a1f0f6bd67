"""A hooked folder as data: hook points, graph inputs, manifest, weights, tokenizer, safe writing; corpora and harvests too."""
