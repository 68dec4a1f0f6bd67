"""The terminal: a file for each group of commands."""

from graphlens.cli.app import app, main

__all__ = ["app", "main"]
