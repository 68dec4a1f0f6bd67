"""The command line: the commands of all groups in one program."""

from __future__ import annotations

import sys

import typer

from graphlens.cli import deploy, export, patch, run
from graphlens.errors import GraphlensError

app = typer.Typer(
    help="Transformers as ONNX files whose internals have names: export, read, edit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# In the order of the help.
for command in (
    run.demo,
    export.export,
    run.hooks,
    run.cache,
    run.run,
    patch.patch,
    patch.attribute,
    run.generate,
    export.process,
    deploy.bake,
    deploy.drivable,
    deploy.strip,
    deploy.check,
):
    app.command()(command)
app.command("cache-clear")(export.cache_clear)


def main() -> None:
    """The entry point: errors of ours are one readable block on stderr and exit code 1; wrong usage exits with 2."""
    try:
        app()
    except GraphlensError as error:
        from rich.console import Console
        from rich.markup import escape
        from rich.panel import Panel

        title = type(error).__name__
        Console(stderr=True).print(Panel(escape(str(error)), title=title, title_align="left", border_style="red"))
        sys.exit(1)


if __name__ == "__main__":
    main()
