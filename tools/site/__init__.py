"""The documentation's site: ``python -m tools.site`` builds it from docs/, the docstrings and the tutorials, and checks it."""
