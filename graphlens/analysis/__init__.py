"""Analysis: what is done with activations once they are arrays. NumPy only."""
