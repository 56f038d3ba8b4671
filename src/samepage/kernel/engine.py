"""The kernel's KSM as an engine (`samepage.service.engine`)."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from samepage import inject
from samepage.kernel import rows as kernel_rows
from samepage.kernel.pace import Pace, Terms
from samepage.kernel.settings import Settings, SettingsError
from samepage.kernel.target import TargetError, name
from samepage.kernel.unmerge import Merged, Outcome, unmerge
from samepage.memory import PAGE_SIZE
from samepage.memory.agent import memory_cgroup
from samepage.service.engine import Answer, Cancelled, Progress

LOOK_EVERY = 1.0
"""Seconds between two looks at how much memory there is to scan."""

ROWS_EVERY = 1.0
"""How long rows are reused, in seconds: to make them, samepage looks at all processes of the machine."""

SUMMED = ("merged", *kernel_rows.FIELDS)


class KernelEngine:
    """Serves all processes of which the kernel has merged something, or that samepage attached to, if `whose` accepts
    them. `reserve`: bytes that unmerging leaves to others. `terms` are for `start`.
    """

    name = "kernel"

    def __init__(
        self,
        reserve: int,
        settings: Settings | None = None,
        whose: Callable[[int], bool] = lambda _: True,
        terms: Terms | None = None,
    ) -> None:
        self._reserve = reserve
        self._settings = settings or Settings()
        self._whose = whose
        self._terms = terms or Terms()
        self._ended = threading.Event()
        self._pacer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._rows: list[Answer] = []
        self._looked = -ROWS_EVERY

    def start(self) -> None:
        """Run ksmd as soon as some memory is mergeable, and set its pace, until `stop`. Raises `SettingsError`."""
        self._settings.hold([os.getpid()], {})
        self._pacer = threading.Thread(target=self._keep_pace, name="pace", daemon=True)
        self._pacer.start()

    def stop(self) -> None:
        """Restore the settings that were found, unless somebody else needs ksmd."""
        self._ended.set()
        if self._pacer is not None:
            self._pacer.join()
        self._settings.release([os.getpid()])

    def _keep_pace(self) -> None:
        pace, begun = Pace(self._settings, self._terms), False
        while not self._ended.wait(LOOK_EVERY):
            with contextlib.suppress(OSError, SettingsError):
                pages = sum(kernel_rows.anonymous_pages(row["pid"]) for row in self.rows())
                # A ksmd that runs with nothing to do begins its pass with the first process that comes, and sees those
                # that come with it in the next pass only: merging them would take a third.
                if pages and not begun:
                    begun = True
                    self._settings.change(self._terms.at_once)
                pace.look(pages)

    def counters(self, owner: str | None = None) -> dict[str, Any]:
        """The machine's counters; for one owner, sums over the owner's processes."""
        rows = self.rows()
        if owner is not None:
            rows = [row for row in rows if row["owner"] == owner]
            return {"processes": len(rows)} | {name: sum(row[name] for row in rows) for name in SUMMED}
        counts = self._settings.counters()
        saved = (counts.get("pages_sharing", 0) + counts.get("ksm_zero_pages", 0)) * PAGE_SIZE
        return counts | {"bytes_saved": saved, "processes": len(rows)}

    def rows(self) -> list[Answer]:
        with self._lock:
            if time.monotonic() - self._looked >= ROWS_EVERY:
                pids = {*kernel_rows.processes(), *self._settings.holders()} - {os.getpid()}
                found = (kernel_rows.row_of(pid) for pid in sorted(pids) if self._whose(pid))
                self._rows = [row for row in found if row is not None and row["ksm_mergeable"]]
                self._looked = time.monotonic()
            return [dict(row) for row in self._rows]

    def commitments(self) -> list[Answer]:
        rows = self.rows()
        for row in rows:
            available, _ = inject.headroom(row["pid"])
            row |= {"cgroup": memory_cgroup(row["pid"]), "bytes_available": available}
        return rows

    def row(self, pid: int) -> Answer | None:
        return next((row for row in self.rows() if row["pid"] == pid), None)

    def files(self) -> dict[str, str]:
        return self._settings.files()

    def knobs(self) -> dict[str, str]:
        return self._settings.knobs()

    def get(self, knob: str) -> str:
        try:
            return self.knobs()[knob]
        except KeyError:
            names = ", ".join(self.knobs())
            raise OSError(errno.EINVAL, f"the kernel has no knob {knob}; it has {names}") from None

    def set(self, knob: str, value: str, cancelled: Cancelled = lambda: False) -> None:
        """Set a knob. The value stays when samepage restores what it found. 2 is never written to `run`, because the
        kernel looks at no limit before it copies. Instead ksmd is stopped, and processes are unmerged one by one."""
        self.get(knob)
        unmerging = knob == "run" and value == "2"
        try:
            self._settings.write(knob, "0" if unmerging else value)
        except SettingsError as e:
            raise OSError(e.errno or errno.EINVAL, str(e)) from e
        if not unmerging:
            return
        done = self.unmerge([], lambda _: None, cancelled)
        if not done["ok"]:
            from samepage.service.control import not_unmerged

            code, why = getattr(errno, done["errno"]), ""
            if code == errno.ENOMEM:
                why = f"{done['bytes_needed']} bytes needed, {done['bytes_available']} available"
            raise not_unmerged(code, done["pages_unmerged"], done["pages_remaining"], why, done["failed"])

    def unmerge(self, pids: list[int], progress: Progress, cancelled: Cancelled) -> Answer:
        """After an error the other processes are still unmerged: they may have other limits. `processes` has a row for
        each."""
        total: Answer = {"errno": None, "pages_unmerged": 0, "pages_remaining": 0, "bytes_needed": 0}
        total |= {"bytes_available": 0, "limits_unseen": False, "failed": [], "processes": []}
        merged = Merged()
        try:
            for pid in pids or [row["pid"] for row in self.rows()]:
                self._unmerge(pid, merged, total, cancelled)
                progress({"pid": pid} | {name: total[name] for name in ("pages_unmerged", "pages_remaining")})
                if total["errno"] == "EINTR":
                    break
        finally:
            merged.close()
            self._looked = -ROWS_EVERY
        return total | {"ok": total["errno"] is None}

    def _unmerge(self, pid: int, merged: Merged, total: Answer, cancelled: Cancelled) -> None:
        try:
            outcome, why = unmerge(pid, merged, self._reserve, cancelled=cancelled), ""
        except TargetError as e:
            outcome, why = Outcome(pid, errno="EPERM", pages_remaining=kernel_rows.merging_pages(pid)), e.why
        row = asdict(outcome)
        total["processes"].append(row)
        total["pages_unmerged"] += outcome.pages_unmerged
        total["pages_remaining"] += outcome.pages_remaining
        total["bytes_needed"] += outcome.bytes_needed
        if outcome.errno is not None:
            comm, state = name(pid), ""
            total["failed"].append(row | {"comm": comm, "state": state} | ({"why": why} if why else {}))
            if total["errno"] is None:
                told = ("errno", "bytes_available", "limits_unseen")
                total |= {name: row[name] for name in told}
