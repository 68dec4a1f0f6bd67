"""The open sessions of this process, so that every engine over the same file uses the same ones."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable

from graphlens.runtime import threads
from graphlens.runtime.sessions import Runnable


class SessionPool:
    """Sessions by key. A session stays open as long as an engine uses it; the pool alone keeps none alive."""

    def __init__(self) -> None:
        self._sessions: weakref.WeakValueDictionary[Hashable, Runnable] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()

    def get(self, key: Hashable, build: Callable[[], Runnable]) -> Runnable:
        """The session of a key. One session is opened at a time.

        Args:
            key: What tells sessions apart: the file and its state, the providers, the plan.
            build: Opens the session where none is open.

        Raises:
            Exception: Whatever ``build`` raises.
        """
        with self._lock:
            session = self._sessions.get(key)
            if session is None:
                session = self._sessions[key] = build()
            return session


class LatelyUsed:
    """A bounded number of open sessions by key: those used longest ago go first. Not safe for several threads at once."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[Hashable, Runnable] = OrderedDict()

    def get(self, key: Hashable, build: Callable[[], Runnable]) -> Runnable:
        """The session of a key.

        Args:
            key: What tells sessions apart.
            build: Opens the session where it is not open.
        """
        if key not in self._sessions:
            self._sessions[key] = build()
            while len(self._sessions) > threads.most_sessions():
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return self._sessions[key]


# A second session over the same file would hold its weights a second time.
POOL = SessionPool()
