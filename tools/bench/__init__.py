"""Benchmarks of graphlens, each printed beside a floor measured in the same run: ``python -m tools.bench list``."""
