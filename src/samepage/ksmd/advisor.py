"""When ksmd works, and how much at a time.

`none`: as ksmd always did, `pages_to_scan` pages, then sleep. `scan-time`: the same, but after every pass
`pages_to_scan` is set so that a pass takes `advisor_target_scan_time`. `cpu`, the default: ksmd looks at new memory and
merges what matches without a pause. It spaces further looks at the same memory so that they cost at most
`advisor_max_cpu` percent of a core. While nothing happens, passes come ever more rarely, up to a second apart.

The cost includes what the application pays: a page that was looked at is write-protected, and its next write faults. It
includes what was spent on merging pages that were then written: a guest that boots, or a heap that is used again, is
full of pages that are equal for a moment. Memory of an application that writes all the time is looked at ever more
rarely. But when it comes to rest, ksmd sees that after no longer than it was in motion, or after ten passes if it was
skipped in some (`age`).
"""

from __future__ import annotations

from samepage.ksmd.knobs import Knobs

BURST_PAGES = 1 << 16
"""Pages hashed in one batch by the advisor "cpu" (256 MiB: some 25 ms for two processes)."""

IDLE_SECONDS = 1.0
"""Longest pause between two passes over memory in which nothing happens."""


LONGEST_SECONDS = 30.0
"""Longest pause between two passes, however much they cost."""

FAULT_SECONDS = 1.8e-6
"""What the first write to a page after a look costs the application, in seconds (measured on Linux 6.18, in a virtual
machine)."""

NEW_SECONDS = 5e-7
"""What ksmd itself may take for a page that it sees for the first time, in seconds, at no charge. A look took
2.7 ms for 771 such pages, and 2.9 ms for 10,844 (measured there, too)."""

BREAK_SECONDS = 7.5e-6
"""The cost of merging a page that is then written: 4 µs to merge it, and 3.5 µs for the write that copies it again
(measured there, too)."""


class Advisor:
    """Turns what batches cost into what to do next. Times are in seconds, of the clock given to `Ksmd`."""

    def __init__(self, knobs: Knobs, new_seconds: float = NEW_SECONDS) -> None:
        self._knobs, self._new_seconds = knobs, new_seconds
        self._paid = 0.0  # by then, looking again will have cost no more than its share of the time
        self._caught_up = 0.0  # when that was last so: since then memory is in motion
        self._last = 0.0  # when something was last spent
        self._joined = True
        self._rest = 0.0  # pause after the pass just over, and its end
        self._rest_until = 0.0
        self._pass_pages = 0
        self._pass_cpu = 0.0

    def batch_pages(self) -> int:
        """How many pages the next batch may hash."""
        if self._knobs.advisor_mode == "cpu":
            return BURST_PAGES
        return self._knobs.pages_to_scan

    def scanned(
        self,
        now: float,
        cpu: float,
        hashed: int,
        first_looks: int,
        broken: int = 0,
        known: float = 1.0,
        own: float = 0.0,
    ) -> None:
        """A batch looked at `hashed` pages, at `first_looks` of them for the first time, for `cpu` seconds, and found
        that the application wrote `broken` pages that were merged. Of the processes that were asked, the share
        `known` was asked before. `own` seconds of `cpu` are ksmd's: new memory is looked at without a pause, but a look
        at a few new pages of a process that is known costs ksmd as much as one at many."""
        self._pass_pages += hashed
        self._pass_cpu += cpu
        again = (cpu + hashed * FAULT_SECONDS) * (1 - first_looks / hashed) if hashed else cpu * known
        if hashed:
            again += known * max(0.0, own * first_looks / hashed - first_looks * self._new_seconds)
        # Bounded: that all memory was overwritten once is no reason to stay away for long.
        most = IDLE_SECONDS * self._knobs.advisor_max_cpu / 100
        self.spent_in_vain(now, again + min(broken * BREAK_SECONDS, most))

    def spent_in_vain(self, now: float, cpu: float) -> None:
        """Called when `cpu` seconds were spent on something that brought nothing new."""
        if self._joined or self._paid <= now:
            self._caught_up = now
        self._joined = False
        self._last = now
        self._paid = max(self._paid, now) + cpu / self._knobs.cpu_share
        self._paid = min(self._paid, now + LONGEST_SECONDS)

    def joined(self) -> None:
        """Called when a process joined or merging was switched on: ends idling."""
        self._rest = self._rest_until = 0.0
        self._joined = True

    def is_due(self, now: float) -> bool:
        """Whether all memory may be looked at now. If not, those who join are looked at alone."""
        return self._knobs.advisor_mode != "cpu" or self.wait(now, urgent=False) <= 0

    def newcomers_seen(self, now: float) -> None:
        """Called when those who joined were looked at alone, which ends idling: from that look to the next it is as
        long as between two passes in which something happens."""
        self._rest = 0.0
        self._rest_until = now + self._knobs.sleep_millisecs / 1000

    def pass_over(self, since: float, quiet: bool) -> None:
        """Called at the end of a pass; `quiet`: nothing had changed, nothing was merged. The pause is counted `since`
        then."""
        sleep = self._knobs.sleep_millisecs / 1000
        self._rest = min(max(2 * self._rest, sleep), max(IDLE_SECONDS, sleep)) if quiet else sleep
        self._rest_until = since + self._rest
        if self._knobs.advisor_mode == "scan-time" and self._pass_pages:
            self._knobs.pages_to_scan = self._scan_time_target(sleep)
        self._pass_pages, self._pass_cpu = 0, 0.0

    def _scan_time_target(self, sleep: float) -> int:
        """Pages a batch for the next pass to take the time it should, without costing more CPU than it may."""
        knobs = self._knobs
        pages = self._pass_pages * sleep / knobs.advisor_target_scan_time
        if self._pass_cpu:
            pages = min(pages, knobs.cpu_share * sleep * self._pass_pages / self._pass_cpu)
        fewest, most = knobs.advised_pages
        return int(min(max(pages, fewest), most))

    def wait(self, now: float, urgent: bool) -> float:
        """Seconds until the next batch. `urgent`: candidates wait to be merged, or memory to be seen at all."""
        if self._knobs.advisor_mode == "cpu":
            paid = min(self._paid, self._last + max(self._last - self._caught_up, IDLE_SECONDS))
            return 0.0 if urgent else max(0.0, paid - now, self._rest_until - now)
        # With no pages at a time there is no hurry.
        return max(self._knobs.sleep_millisecs / 1000, 0.0 if self._knobs.pages_to_scan else IDLE_SECONDS)
