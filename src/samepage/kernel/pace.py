"""How fast ksmd scans: quickly while there is new memory, and otherwise as it was found.

As the kernel comes, ksmd looks at 100 pages and sleeps for 20 ms: 1 GiB takes it a minute, and a page is merged when it
was seen unchanged twice. That is a fair price for memory that was looked at already, and much too late for what is new.
"""

from __future__ import annotations

from samepage.kernel.settings import Settings, SettingsError

QUICK = {"pages_to_scan": "20000", "sleep_millisecs": "1"}
"""Most of one CPU, at nice 5 as ksmd always is."""

PASSES = 3
"""Passes over new memory: one to see it, one to see that it stayed the same, and the one that was under way before."""

GREW = 4096
"""New pages that are worth it, and at least a twentieth of what there was."""


class Pace:
    """Sets the pace while knobs are held. Does nothing where the kernel's own advisor does (6.8, `advisor_mode`)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._leave = settings.read("advisor_mode", "none") != "none"
        self._idle = {name: settings.read(name, "") for name in QUICK}
        self._seen = self._until = 0
        self._quick = False

    def look(self, pages: int) -> None:
        """To be called now and then, with how many anonymous pages there are."""
        if self._leave:
            return
        scans = int(self._settings.read("full_scans", "0"))
        if pages >= self._seen + max(GREW, self._seen // 20):
            self._seen, self._until = pages, scans + PASSES
        self._seen = min(self._seen, max(pages, 0) + GREW)
        if (scans < self._until) == self._quick:
            return
        self._quick = not self._quick
        try:
            self._settings.change(QUICK if self._quick else self._idle)
        except SettingsError:
            self._leave = True  # somebody else keeps it from us
