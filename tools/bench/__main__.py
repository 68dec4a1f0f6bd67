"""The command: one case, all of them, or the list."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console

from tools.bench import cases, commits, ratios
from tools.bench.harness import Case, Setup
from tools.bench.machine import describe_machine
from tools.bench.report import Report, show, show_machine, to_json, to_markdown
from tools.bench.standin import prepare
from tools.bench.trees import both_trees

WORKDIR = Path(tempfile.gettempdir()) / "graphlens-bench"


def case_names() -> list[str]:
    """Every case: the modules of tools/bench/cases."""
    return sorted(module.name for module in pkgutil.iter_modules(cases.__path__))


def load_case(name: str) -> tuple[Case, str]:
    """A case and its one-line summary. Exits when there is none of that name."""
    if name not in case_names():
        raise typer.BadParameter(f"{name!r} is no case. There are: {', '.join(case_names())}; or list, all.")
    module: ModuleType = importlib.import_module(f"{cases.__name__}.{name}")
    return module.CASE, (module.__doc__ or name).strip().splitlines()[0]


def run_one(name: str, model: str | None, repeats: int | None, workdir: Path) -> Report:
    """Runs one case in this process."""
    case, summary = load_case(name)
    machine = describe_machine()
    setup = Setup(prepare(model or case.model, workdir), repeats or case.repeats)
    return Report(name, summary, setup.model.name, setup.repeats, machine, case.run(setup))


def run_all(options: list[str], console: Console) -> tuple[list[Report], dict[str, str]]:
    """Runs every case in a process of its own, so that none inherits another's memory: (reports, failures)."""
    reports, failures = [], {}
    for name in case_names():
        with tempfile.TemporaryDirectory() as folder, console.status(name):
            found = Path(folder) / "report.json"
            command = [sys.executable, "-m", "tools.bench", name, "--json", str(found), *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if found.is_file():
                reports.append(Report.from_dict(json.loads(found.read_text())[0]))
            else:
                failures[name] = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if name in failures:
            console.print(f"[red]{name} failed:[/]\n{done.stderr}")
        else:
            show(reports[-1], console)
    return reports, failures


def run_against(
    case: str, against: str, model: str | None, repeats: int | None, workdir: Path, console: Console
) -> list[ratios.Comparison]:
    """Runs one case, or all that can, on a commit and on the working tree, in turns."""
    found = {name: load_case(name) for name in ([case] if case in case_names() else case_names())}
    chosen = {name: each for name, each in found.items() if commits.comparable(each[0])}
    if case not in chosen and case != "all":
        able = [name for name in case_names() if commits.comparable(load_case(name)[0])]
        raise typer.BadParameter(
            f"{case!r} cannot be measured on one commit alone. There are: {', '.join(able)}; or all."
        )
    done = []
    with both_trees(against, workdir) as trees:
        for name, (each, summary) in chosen.items():
            setup = Setup(prepare(model or each.model, workdir), repeats or max(each.repeats, commits.REPEATS))
            with console.status(name):
                done.append(commits.compare(name, summary, each, setup, trees))
            ratios.show(done[-1], console)
    return done


def main(
    case: Annotated[str, typer.Argument(help="A case's name, 'list', 'all', or 'page' (of reports by --from).")],
    model: Annotated[
        str | None, typer.Option(help="small, large, llama-135m, tiny, or a folder. Default: the case's own.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Measured rounds. Default: the case's own.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all samples here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a Markdown page here.")] = None,
    reports_from: Annotated[
        list[Path] | None, typer.Option("--from", help="A report that --json wrote; several times.")
    ] = None,
    workdir: Annotated[Path, typer.Option(help="Where models are made and kept.")] = WORKDIR,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="COMMIT",
            help="Compare the working tree with this commit instead, in turns in one run: a case, or all that can.",
        ),
    ] = None,
) -> None:
    """Measure graphlens against bare ONNX Runtime in the same run. Targets are shown; nothing fails over one.

    With --against COMMIT: both commits on the same weights and inputs, each in processes of its own, in turns; shown
    are the pairs' ratios new / old and their spread. For example: python -m tools.bench one_hook --against HEAD~1
    """
    console = Console()
    if case == "list":
        for name in case_names():
            found, summary = load_case(name)
            able = ", --against" if commits.comparable(found) else ""
            console.print(f"[cyan]{name:20}[/] {summary} [dim]({found.model}, {found.repeats} rounds{able})[/]")
        return
    if against is not None:
        show_machine(describe_machine(), console)
        compared = run_against(case, against, model, repeats, workdir.expanduser().resolve(), console)
        if json_path is not None:
            json_path.write_text(ratios.to_json(compared))
        if markdown is not None:
            markdown.write_text(ratios.to_markdown(compared))
        return
    machine, failures = describe_machine(), dict[str, str]()
    if case == "page":
        reports = [Report.from_dict(item) for path in reports_from or () for item in json.loads(path.read_text())]
        if not reports:
            raise typer.BadParameter("a page is made of reports: name them by --from.")
        machine = dict(reports[0].machine)
    show_machine(machine, console)
    if case == "page":
        for report in reports:
            show(report, console)
    elif case == "all":
        options = ["--workdir", str(workdir), *(["--model", model] if model else [])]
        options += ["--repeats", str(repeats)] if repeats else []
        reports, failures = run_all(options, console)
    else:
        reports = [run_one(case, model, repeats, workdir.expanduser().resolve())]
        show(reports[0], console)
    if json_path is not None:
        json_path.write_text(to_json(reports))
    if markdown is not None:
        markdown.write_text(to_markdown(reports, failures, machine))


if __name__ == "__main__":
    typer.run(main)
