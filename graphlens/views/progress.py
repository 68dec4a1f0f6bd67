"""Progress for people: a spinner or bar on a terminal or in a notebook, and nothing at all when nobody is watching."""

from __future__ import annotations

import contextlib
import html
import sys
import time
from collections.abc import Callable, Iterator

_EVERY = 0.1  # seconds between two pictures of a bar in a notebook


class Steps:
    """The handle of a running progress bar.

    Args:
        update: Shows that so many steps are done.
    """

    def __init__(self, update: Callable[[int], None]) -> None:
        self._update, self._done = update, 0

    def advance(self, count: int = 1) -> None:
        """Counts so many steps as done."""
        self._done += count
        self._update(self._done)


def notebook() -> str | None:
    """Which notebook this runs in: "jupyter" (also Colab and VS Code), "marimo", or None."""
    marimo = sys.modules.get("marimo")
    if marimo is not None and marimo.running_in_notebook():
        return "marimo"
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # A terminal's IPython has no kernel to send pictures to.
    return "jupyter" if shell is not None and getattr(shell, "kernel", None) is not None else None


@contextlib.contextmanager
def spinner(message: str) -> Iterator[None]:
    """Shows ``message`` while the ``with`` block runs, with a spinner on a terminal; in a notebook too, and nowhere else."""
    kind = notebook()
    if kind is not None:
        with _in_notebook(kind, message, None):
            yield
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(escape(message)):  # a path may look like markup
        yield


@contextlib.contextmanager
def steps(message: str, total: int, unit: str = "") -> Iterator[Steps]:
    """Shows a progress bar on a terminal or in a notebook while the ``with`` block runs.

    Args:
        message: The text beside it.
        total: The number of steps.
        unit: What a step is, in the plural ("tokens"): how many of them pass in a second is shown then.

    Yields:
        The handle whose ``advance()`` counts one step.
    """
    kind = notebook()
    if kind is not None:
        with _in_notebook(kind, message, total, unit) as update:
            yield Steps(update)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, ProgressColumn, Task
    from rich.text import Text

    class Speed(ProgressColumn):
        """How many steps pass in a second."""

        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} {unit}/s", style="progress.data.speed")

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), *([Speed()] if unit else []))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(message), total=total)
        yield Steps(lambda done: progress.update(task, completed=done))


@contextlib.contextmanager
def _in_notebook(kind: str, message: str, total: int | None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A bar in a notebook that vanishes at the end of the ``with`` block; in Jupyter an error leaves it as it was.

    Args:
        kind: "jupyter" or "marimo".
        message: The text beside it.
        total: The number of steps; None where it is not known.
        unit: What a step is, where how many pass in a second is shown.

    Yields:
        What shows that so many steps are done.
    """
    if kind == "marimo":
        status, shown = sys.modules["marimo"].status, 0
        if total is None:
            with status.spinner(title=message, remove_on_exit=True):
                yield lambda done: None
            return
        with status.progress_bar(total=total, title=message, remove_on_exit=True) as bar:

            def advance(done: int) -> None:
                nonlocal shown
                bar.update(done - shown)
                shown = done

            yield advance
        return
    display = sys.modules["IPython"].display
    start, last = time.monotonic(), 0.0
    handle = display.display(display.HTML(_picture(message, 0, total, 0)), display_id=True)

    def update(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY or done == total:
            last = now
            handle.update(display.HTML(_picture(message, done, total, now - start, unit)))

    yield update
    handle.update(display.HTML(""))


def _picture(message: str, done: int, total: int | None, seconds: float, unit: str = "") -> str:
    """A bar as HTML."""
    bar = (
        f'<progress max="{total}" value="{done}"></progress> {done:,} of {total:,}'
        if total
        else "<progress></progress>"
    )
    left = f", about {seconds / done * (total - done):.0f} s left" if total and 0 < done < total else ""
    speed = f", {done / seconds:,.0f} {html.escape(unit)}/s" if unit and seconds > 0 else ""
    return f"<div>{html.escape(message)} {bar}{speed}{left}</div>"


def note(message: str) -> None:
    """One line on stderr for people; silent where nobody is watching."""
    if notebook() is not None:
        print(message, file=sys.stderr)
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        console.print(message, highlight=False, markup=False)
