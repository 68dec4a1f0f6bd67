"""The activations of one run, and everything that is computed from them."""
