"""How a transformers module becomes a graph: tracing, checkpoints, a file for each model family."""
