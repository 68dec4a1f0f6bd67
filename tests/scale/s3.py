"""An S3 server of this machine, moto's, for as long as a test or a row of ``python -m tests.scale --all`` needs it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from tests.scale.harvests import REPOSITORY, harvested

BUCKET = "s3://harvests"


def missing() -> str:
    """Which package the server needs and this environment lacks; "" where all are there."""
    return next((name for name in ("s3fs", "moto", "flask") if find_spec(name) is None), "")


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Runs the server with one empty bucket, whose URL this yields. This process and those it starts find it by environment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, running)
        with mock.patch.dict(os.environ, environment):
            system_of(BUCKET)[0].mkdir(BUCKET)
            yield BUCKET
    finally:
        running.kill()
        running.wait()


def _wait_for(port: int, running: subprocess.Popen[bytes]) -> None:
    """Waits until the server answers."""
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if running.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"moto's server does not answer (exit code {running.poll()})") from None
            time.sleep(0.1)


def system_of(url: str):  # type: ignore[no-untyped-def]  # fsspec has no types
    """(the file system of a URL, the path in it)."""
    from fsspec.core import url_to_fs

    return url_to_fs(url, use_listings_cache=False, skip_instance_cache=url.startswith("s3:"))


def content(url: str) -> dict[str, str]:
    """The digest of each object below a URL, by its name."""
    system, root = system_of(url)
    return {
        path.removeprefix(f"{root}/"): hashlib.sha256(system.cat_file(path)).hexdigest()
        for path in sorted(system.find(root))
    }


def killed_at(request: int, out: str, cache: Path) -> int:
    """Harvests to S3 in a process that is killed right before a request that writes or removes an object.

    ``request``: Which; -1 for none. Returns how many there were before the end.
    """
    code = f"from tests.scale.s3 import play; play({request}, {out!r})"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GRAPHLENS_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert done.returncode == (0 if request < 0 else -signal.SIGKILL), (request, done.stderr[-3000:])
    return int(done.stdout) if request < 0 else request


def play(request: int, out: str) -> None:
    """What ``killed_at`` runs in a process of its own."""
    from graphlens.file.remote import filesystem

    system, seen = filesystem(out)[0], 0  # fsspec gives the same object to whoever asks for it

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal seen
            if seen == request:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            return real(*arguments)

        return call

    for name in ("pipe_file", "put_file", "rm_file"):
        setattr(system, name, counted(getattr(system, name)))
    harvested(out)
    print(seen)
