"""One run with what is active, and the TransformerLens-shaped object around it."""
