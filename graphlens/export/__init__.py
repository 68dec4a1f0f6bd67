"""Export: from a checkpoint folder to a hooked graph. The only wing that imports torch and transformers."""
