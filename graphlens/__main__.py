"""``python -m graphlens``: the command line."""

from graphlens.cli.app import main

main()
