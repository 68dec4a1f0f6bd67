"""Progress for people: a spinner or bar on stderr, and nothing at all when nobody is watching."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextlib.contextmanager
def spinner(message: str) -> Iterator[None]:
    """Shows ``message`` with a spinner while the ``with`` block runs, on a terminal only."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(message):
        yield


@contextlib.contextmanager
def steps(message: str, total: int) -> Iterator[Steps]:
    """Shows a progress bar on a terminal while the ``with`` block runs.

    Args:
        message: The text beside it.
        total: The number of steps.

    Yields:
        The handle whose ``advance()`` counts one step.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Steps(progress, progress.add_task(message, total=total))


class Steps:
    """The handle of a running progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int = 1) -> None:
        """Counts so many steps as done."""
        self._progress.advance(self._task, count)


def note(message: str) -> None:
    """One line on stderr for people; silent when stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        console.print(message, highlight=False)
