"""Builds the documentation's site: ``python -m tools.site``. A warning, a dead link or a request elsewhere is an error.

Needs the extra ``docs`` and Chromium. Tutorials are run, of which 4_node_and_browser needs Node and npm, and pages are opened in
Chromium; ``--no-run`` does neither. ``python -m http.server -d build/site`` shows what was built.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.site.checks import faults, without_pictures
from tools.site.notebooks import add_tutorials
from tools.site.reference import add_reference
from tools.site.staging import ROOT, Stage, wants_picture, write_settings
from tools.site.visit import visited

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
COMPLAINT = re.compile(r"warning|error|griffe", re.IGNORECASE)


def build(out: Path, run: bool) -> list[str]:
    """Builds the site into a folder, in the place of what is there; returns what is wrong with it."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder).resolve())
        stage.add_repository()
        took = add_tutorials(stage, run)
        add_reference(stage)
        stage.write()
        settings = write_settings(stage)
        for name, seconds in took.items():
            print(f"{name}: {seconds:.1f} s")
        program = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(settings)]
        search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": search}
        done = subprocess.run(program, cwd=stage.folder, env=environment, text=True, capture_output=True, check=False)
        said = [COLOURS.sub("", line) for line in (done.stdout + done.stderr).splitlines()]
        complaints = [line for line in said if COMPLAINT.search(line)]
        if done.returncode or complaints:
            return [*said, f"zensical ended with {done.returncode}"]
        built = stage.folder / "site"
        found = faults(built)
        # What a tutorial shows is there only where it was run.
        shown = [page for page in stage.pages if wants_picture(page) and (run or not page.startswith("tutorials/"))]
        found += without_pictures(built, shown)
        if run:
            tutorials = [page.removesuffix(".md") + "/" for page in stage.pages if page.startswith("tutorials/")]
            found += visited(built, ["", "start/", "speed/", "api/model/", *tutorials], word="residual")
        if out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(built, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    print(f"{out}: {len(stage.pages)} pages, {size:.1f} MB, {time.perf_counter() - started:.0f} s")
    return found


def main() -> int:
    """Builds and checks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.site", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "build/site", help="the folder (build/site)")
    parser.add_argument("--no-run", action="store_true", help="do not run the tutorials")
    asked = parser.parse_args()
    found = build(asked.out, not asked.no_run)
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
