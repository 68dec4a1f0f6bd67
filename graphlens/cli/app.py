"""The command line: the commands of all groups in one program."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Annotated, NoReturn

import typer

from graphlens.cli import adopt, deploy, drift, export, features, foreign, graph, harvest, page, patch, report, run
from graphlens.cli.options import say
from graphlens.cli.words import in_words_of_commands
from graphlens.errors import GraphlensError
from graphlens.file.version import __version__
from graphlens.views.wording import PLAIN

DEFECT = 70  # the exit code of a program with an error of its own: EX_SOFTWARE of sysexits.h
# Of a disk or of what stdout leads to, wherever something is written.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    """Prints the version and ends the program, where it is asked for."""
    if wanted:
        typer.echo(f"graphlens {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Transformers as ONNX files whose internals have names: export, read, edit."""


# In the order of the help.
for command in (
    run.demo,
    export.export,
    adopt.adopt,
    foreign.inspect,
    foreign.expose,
    run.hooks,
    run.cache,
    harvest.harvest,
    run.run,
    patch.patch,
    patch.attribute,
    graph.graph,
    drift.drift,
    report.report,
    features.features,
    run.generate,
    export.process,
    deploy.bake,
    deploy.drivable,
    page.page,
    deploy.strip,
    deploy.check,
    deploy.seal,
):
    app.command()(command)
app.command("harvest-check")(harvest.harvest_check)
app.command("edits-schema")(deploy.edits_schema)
app.command("cache-clear")(export.cache_clear)


def main() -> None:
    """The entry point: errors of ours are one readable block on stderr and exit code 1; wrong usage exits with 2.

    What is no error of ours is a defect of graphlens: it exits with 70 and says how to report it.
    """
    _print_anything()
    try:
        with _warnings_as_lines():
            app(prog_name="graphlens")
    except GraphlensError as error:
        _block(type(error).__name__, in_words_of_commands(str(error)))
        sys.exit(1)
    except MemoryError as error:
        _block(
            "MemoryError", f"there is not enough memory for this ({error}). Give it less at once, or a smaller model."
        )
        sys.exit(1)
    except (SystemExit, KeyboardInterrupt):
        raise
    except OSError as error:
        if error.errno not in _NO_ROOM:
            _defect(error)
        where = "what this prints" if error.filename is None else os.fsdecode(error.filename)
        _block("OSError", f"{where} could not be written: {error.strerror}. Make room, or write to another place.")
        sys.exit(1)
    except BaseException as error:  # noqa: BLE001  # the last resort; a panic in the tokenizers package is no Exception
        _defect(error)


def _defect(error: BaseException) -> NoReturn:
    """Reports an error of graphlens's own, and ends the program."""
    _block(
        "a defect of graphlens",
        f"{type(error).__name__}: {error}\n\ngraphlens {__version__} was asked for: {shlex.join(sys.argv[1:])}\n"
        "This should have been a sentence about what is wrong. Please report it, with this block and the lines below.",
    )
    say("".join(traceback.format_exception(error)))
    sys.exit(DEFECT)


def _block(title: str, text: str) -> None:
    """Prints a block on stderr."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(text), title=title, title_align="left", border_style="red"))


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Inside the ``with`` block, a warning is one line on stderr: it points at no code of the user's."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        say(f"Warning: {in_words_of_commands(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _print_anything() -> None:
    """Lets stdout and stderr print any text: what their encoding lacks becomes something as wide, or an escape."""
    codecs.register_error("graphlens", _in_place_of)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="graphlens")


def _in_place_of(error: UnicodeError) -> tuple[str | bytes, int]:
    """What is printed in place of characters that a stream cannot encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end].translate(PLAIN)
    return "".join(c if c.isascii() else c.encode("ascii", "backslashreplace").decode() for c in wanted), error.end


if __name__ == "__main__":
    main()
