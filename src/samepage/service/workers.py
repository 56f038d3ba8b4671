"""Threads that do what connections ask for, shared fairly among users."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

MOST = 64
"""The most threads."""

OF_ONE_USER = 16
"""How many of them may be busy for one user. A user who finds a way to block threads can block no more than that."""

OF_ONE_GUEST, OF_ALL_GUESTS = 4, 16
"""The same for a user who does not own the service, and for all such users together; the rest is for the owner."""

REST = 3
"""After a second of CPU time of work for users other than the owner, their next work begins no sooner than so many
seconds later. So they get at most a quarter of the interpreter's lock, which all threads and ksmd share."""

FROM_THE_START = 4
"""Threads that exist from the start: if no more can be started, these do the work."""

Work = Callable[[], None]


class Workers:
    """Does the work of each user in order, and of several users in turn. Raises RuntimeError if not even the first
    threads can be started."""

    def __init__(self, failed: Callable[[Exception], None], owner: int | None = None) -> None:
        self._failed = failed
        self._owner = owner  # None: everybody is as good as the owner
        self._guests_busy = 0
        self._guests_rest = 0.0  # until when, in time.monotonic
        self._changed = threading.Condition()
        self._waiting: dict[int, deque[Work]] = {}  # by user; who was served last is last
        self._busy: Counter[int] = Counter()
        self._threads = self._idle = self._queued = 0
        self._ending = False
        for _ in range(FROM_THE_START):
            self._start()

    def submit(self, user: int, work: Work) -> None:
        """Queue work. It may raise anything; `failed` is told."""
        with self._changed:
            self._waiting.setdefault(user, deque()).append(work)
            self._queued += 1
            self._changed.notify()
            if self._queued > self._idle and self._threads < MOST and self._may_begin(user):
                # This user or this cgroup may start no more threads: the work waits for an existing one.
                with contextlib.suppress(RuntimeError):
                    self._start()

    def end(self) -> None:
        """End the threads that wait now, the others when their work is done."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def _start(self) -> None:
        threading.Thread(target=self._run, name="connections", daemon=True).start()
        self._threads += 1

    def _run(self) -> None:
        while taken := self._take():
            user, work = taken
            began = time.thread_time()
            try:
                work()
            except Exception as e:
                self._failed(e)
            finally:
                with self._changed:
                    self._busy[user] -= 1
                    if self._is_guest(user):
                        self._guests_busy -= 1
                        now = time.monotonic()
                        self._guests_rest = max(self._guests_rest, now) + REST * (time.thread_time() - began)
                    if not self._busy[user]:
                        del self._busy[user]
                    self._changed.notify()

    def _is_guest(self, user: int) -> bool:
        return self._owner not in (None, user)

    def _may_begin(self, user: int) -> bool:
        if not self._is_guest(user):
            return self._busy[user] < OF_ONE_USER
        free = self._busy[user] < OF_ONE_GUEST and self._guests_busy < OF_ALL_GUESTS
        return free and time.monotonic() >= self._guests_rest

    def _rest(self) -> float | None:
        """How many seconds until waiting work of guests may be done again."""
        left = self._guests_rest - time.monotonic()
        return max(left, 0.001) if self._queued and left > -1.0 else None

    def _take(self) -> tuple[int, Work] | None:
        with self._changed:
            while not self._ending:
                for user, works in self._waiting.items():
                    if self._may_begin(user):
                        self._busy[user] += 1
                        self._guests_busy += self._is_guest(user)
                        self._queued -= 1
                        work = works.popleft()
                        del self._waiting[user]
                        if works:
                            self._waiting[user] = works
                        return user, work
                self._idle += 1
                self._changed.wait(self._rest())
                self._idle -= 1
            return None
