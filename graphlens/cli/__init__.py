"""The terminal: a file for each group of commands."""
