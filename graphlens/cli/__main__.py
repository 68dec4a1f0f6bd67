"""``python -m graphlens.cli``: the same command line."""

from graphlens.cli.app import main

main()
