"""How many threads sessions have: those that a process is limited to, and of sessions that take turns only some.

Each session has threads of its own, which sleep while another one runs. An idle thread costs some 70 kB, and there is one session
for every piece of a block that a sweep enters at. On 64 cores those of a model of 12 blocks would come to 4,000 threads.
"""

from __future__ import annotations

import os

MOST_EACH = 16  # threads of a session that takes turns; what it computes at once is a block's piece
MOST_IDLE = 1024  # threads of all pieces of a model together
_limit = 0  # 0: none


def limit(count: int) -> None:
    """Has the sessions that this process opens from now on compute with so many threads each, the calling one included.

    Args:
        count: How many; 0 for ONNX Runtime's own choice, the machine's cores.
    """
    global _limit
    _limit = count


def limited() -> int:
    """The threads that sessions are limited to; 0 where ONNX Runtime chooses."""
    return _limit


def cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def of_each() -> int:
    """How many threads a session that takes turns asks for; 0 where ONNX Runtime's own choice is no more than may be."""
    if _limit:
        return min(_limit, MOST_EACH)
    return MOST_EACH if cores() > MOST_EACH else 0


def most_sessions() -> int:
    """How many pieces of a model stay open: their threads come to at most ``MOST_IDLE``. Each has the caller's besides."""
    return max(8, MOST_IDLE // max(1, min(cores(), MOST_EACH) - 1))
