"""What is computed from activations and logits once they are arrays."""
