"""Letting the time of a recording pass again for ksmd: what an engine with some settings would have saved and cost.

The engine is ksmd itself, over recorded address spaces. The clock advances by the time that ksmd waits and by the CPU
time that it is computed to spend.

The kernel's ksmd uses the same algorithm (on the same memory both make the same counters). So it is modelled by this
ksmd with the kernel's defaults and costs, and with all memory that the kernel can merge: also what `samepage run`
leaves alone, what a fork shares, and pages where they are. Its smart_scan is not modelled: it looks at every page in
every pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from samepage.arrays import Ints, expand
from samepage.estimate.predict import this_host
from samepage.estimate.report import KSM_PAGE_SECONDS, SAMEPAGE_EXTENT_SECONDS, SAMEPAGE_PAGE_SECONDS
from samepage.fleet import FleetError
from samepage.fleet.schema import Recorded
from samepage.fleet.space import Content, Costs, Meter, RecordedAddressSpace
from samepage.ksmd import KNOBS, Counters, Ksmd
from samepage.ksmd.mm_slot import MmSlot
from samepage.memory import AREA, PAGE_SIZE


class Engine(StrEnum):
    """Who merges."""

    SAMEPAGE = "samepage"
    KERNEL = "kernel"


HASH_SECONDS = 2.5e-6
"""A page that samepage looks at, its service included: 512 MiB for the first time took 0.34 s of CPU (Linux 6.18, on a
busy machine)."""

KSM_LOOK_SECONDS = 1.6e-6
"""A page that the kernel's ksmd looks at again, and finds as it was: 3.4 s for 8 GiB (docs/benchmarks.md)."""

RESTORE_SECONDS = 3.2e-6
"""3.0 to 3.4 µs (docs/architecture.md, islands)."""

COSTS = {
    Engine.SAMEPAGE: Costs(HASH_SECONDS, SAMEPAGE_EXTENT_SECONDS, SAMEPAGE_PAGE_SECONDS, RESTORE_SECONDS),
    Engine.KERNEL: Costs(KSM_LOOK_SECONDS, 0.0, KSM_PAGE_SECONDS, 0.0),
}

KERNEL_DEFAULTS: dict[str, str] = {"advisor_mode": "none", "use_zero_pages": "0", "smart_scan": "0"}

COALESCED_PAGES = 4096
"""Smaller batches are joined at the same rate: a simulation need not be so fine."""

QUIET_PASSES = 70
"""After so many passes without anything new, nothing more happens until the next look: nothing waits for longer
(`samepage.ksmd.islands`, `deferred`)."""

LEAST_SECONDS = 1e-4


@dataclass(frozen=True, slots=True)
class Setting:
    """An engine, and the knobs that differ from its defaults."""

    engine: Engine
    knobs: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([str(self.engine), *(f"{name}={value}" for name, value in self.knobs.items())])


@dataclass(slots=True)
class Moment:
    """The state just before the next look. Bytes and pages are of the whole memory, extrapolated from the sample."""

    seconds: float
    """Since the first look began."""
    bytes_saved: int
    cpu_seconds: float
    counters: dict[str, int]


SCALED = (
    *("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages", "pages_broken"),
    *("pages_inherited", "pages_deferred", "pages_scanned", "stable_node_chains", "stable_node_dups"),
)


@dataclass(slots=True)
class Outcome:
    """What a setting saved and cost."""

    setting: Setting
    moments: list[Moment]
    passes: int
    cpu_seconds: float
    pages_broken: int
    """Merged pages that the application wrote, each of which cost it a wait for a copy."""
    metadata_bytes: int

    @property
    def mean_saved(self) -> int:
        """The bytes saved, on average over the time."""
        ends = [moment.seconds for moment in self.moments]
        lengths = np.diff([0.0, *ends])
        saved = [moment.bytes_saved for moment in self.moments]
        return round(float(np.average(saved, weights=lengths)))


def settings(engines: Iterable[Engine], assignments: Iterable[str]) -> list[Setting]:
    """Each engine with its defaults, and with every combination of the knobs' values. Raises FleetError."""
    values: dict[str, list[str]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if name not in KNOBS or not equals or name == "run":
            raise FleetError(f"{assignment!r} is not KNOB=VALUE[,VALUE...]; knobs are {', '.join(KNOBS)} (but not run)")
        values[name] = text.split(",")
        for value in values[name]:
            try:
                KNOBS[name].parse(value)
            except OSError as e:
                raise FleetError(f"{e.strerror}: {e.filename}") from e
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    return [Setting(engine, knobs) for engine in engines for knobs in ([{}, *combinations] if values else [{}])]


Process = tuple[int, str]
"""A pid and its program."""


def contents(look: Recorded, engine: Engine) -> Iterator[tuple[Process, int, Content]]:
    """The processes of a look, with the memory that the engine could merge, and their users."""
    mappings = pq.read_table(look.mappings).to_pandas(strings_to_categorical=False)
    pages = pq.read_table(look.pages, columns=["mapping", "vpn", "npages", "hash", "forked"])
    mapping = pages["mapping"].to_numpy()
    npages = pages["npages"].to_numpy()
    vpn, content = pages["vpn"].to_numpy(), pages["hash"].to_numpy().view(np.uint64)
    forked = pages["forked"].to_numpy()
    for (pid, image), mine in mappings.groupby(["pid", "image"], observed=True, sort=False):
        # Every file is a process of its own.
        chosen = mine if engine is Engine.KERNEL else mine[mine["taken"]]
        if not len(chosen):
            continue
        at = np.flatnonzero(np.isin(mapping, chosen["mapping"].to_numpy()))
        lengths = npages[at]
        vpns = expand(vpn[at], lengths)
        order = np.argsort(vpns, kind="stable")
        areas = np.array(sorted(_joined(zip(chosen["vpn"], chosen["end"], strict=True))), AREA)
        yield (
            (int(pid), str(image)),
            max(0, int(mine["domain"].iloc[0])),
            Content(
                vpns[order],
                np.repeat(content[at], lengths)[order],
                np.repeat(forked[at], lengths)[order],
                areas,
                len(mine),
            ),
        )


Seen = dict[Process, tuple[int, Content]]
"""Users and pages by process."""


def mended(before: Content, now: Content, after: Content) -> Content:
    """The look with pages filled in that are missing in it alone, and equal in the looks before and after. samepage was
    swapping these pages, which are out of their place for a moment."""
    old, new = (np.searchsorted(content.vpn, before.vpn) for content in (now, after))
    missing = _at(now.vpn, old) != before.vpn
    missing &= _at(after.vpn, new) == before.vpn
    missing &= _at(after.content, new) == before.content
    if not missing.any():
        return now
    vpn = np.concatenate([now.vpn, before.vpn[missing]])
    order = np.argsort(vpn, kind="stable")
    content = np.concatenate([now.content, before.content[missing]])[order]
    forked = np.concatenate([now.forked, before.forked[missing]])[order]
    ranges = [(int(start), int(start + count)) for start, count in [*before.areas.tolist(), *now.areas.tolist()]]
    return Content(vpn[order], content, forked, np.array(_joined(ranges), AREA), now.map_count)


def _at(values: Any, at: Ints) -> Any:
    """The value at an index; beyond the end, a value that no page has."""
    return np.append(values, values.dtype.type(0))[at] if len(values) else np.zeros(len(at), values.dtype)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of pages, as first and count; adjacent ones are joined."""
    out: list[tuple[int, int]] = []
    for start, end in sorted((int(start), int(end)) for start, end in ranges):
        if out and start <= out[-1][0] + out[-1][1]:
            first, count = out[-1]
            out[-1] = (first, max(count, end - first))
        else:
            out.append((start, end - start))
    return out


class Replay:
    """The replay of one host's recording with one setting."""

    def __init__(self, setting: Setting, fraction: float, pids: Collection[int] = ()) -> None:
        """`pids`: only these processes; if empty, all."""
        self._setting, self._fraction, self._pids = setting, fraction, pids
        self._meter = Meter(COSTS[setting.engine], 1 / fraction)
        self.now = 0.0
        # The meter counts what agents take, too, which ksmd does not count as its own.
        new = COSTS[setting.engine].looked / fraction
        self._ksmd = Ksmd(clock=lambda: self.now, cpu_clock=lambda: self._meter.seconds, new_seconds=new)
        kernel = KERNEL_DEFAULTS if setting.engine is Engine.KERNEL else {}
        for name, value in (kernel | setting.knobs).items():
            self._ksmd.set(name, value)
        self._spaces: dict[Process, tuple[RecordedAddressSpace, MmSlot]] = {}
        self._skipped_passes, self._skipped_cpu = 0.0, 0.0
        self._broken = 0

    def run(self, looks: list[Recorded], last: float | None = None) -> Outcome:
        """Replay all looks. After the last, go on for as long as between the two before, or for `last` seconds."""
        begins = [look.head.look / 1e6 for look in looks]
        after = last if last is not None else (begins[-1] - begins[-2] if len(begins) > 1 else 60.0)
        first = begins[0]
        moments = []
        for seen, until in zip(self._seen(looks), [*begins[1:], begins[-1] + after], strict=True):
            self._look(seen)
            self._let_pass(until - first)
            moments.append(self._moment())
        counters = self._ksmd.counters()
        return Outcome(
            self._setting,
            moments,
            round(counters.full_scans + self._skipped_passes),
            counters.cpu_seconds + self._skipped_cpu,
            round(self._broken / self._fraction),
            round(counters.metadata_bytes / self._fraction),
        )

    def _seen(self, looks: list[Recorded]) -> Iterator[Seen]:
        """The looks, corrected for pages that samepage was just swapping (`mended`)."""
        before: Seen = {}
        now = self._content(looks[0])
        for later in [*looks[1:], None]:
            after = self._content(later) if later else {}
            for process in now.keys() & before.keys() & after.keys():
                domain, content = now[process]
                now[process] = domain, mended(before[process][1], content, after[process][1])
            yield now
            before, now = now, after

    def _content(self, look: Recorded) -> Seen:
        return {
            process: (domain, content)
            for process, domain, content in contents(look, self._setting.engine)
            if not self._pids or process[0] in self._pids
        }

    def _look(self, seen: Seen) -> None:
        in_place = self._setting.engine is Engine.KERNEL
        limit = this_host().max_map_count * 2 // 3 if self._fraction == 1 and not in_place else 1 << 40
        there = set()
        for process, (domain, content) in seen.items():
            there.add(process)
            if process not in self._spaces:
                # The kernel merges pages of all users.
                space = RecordedAddressSpace(process[0], 0 if in_place else domain, self._meter, in_place, limit)
                space.becomes(content)
                self._spaces[process] = space, self._ksmd.enter(space)
            else:
                self._broken += self._spaces[process][0].becomes(content)
        for process in self._spaces.keys() - there:
            space, slot = self._spaces.pop(process)
            space.exit()
            self._ksmd.exit(slot)

    def _let_pass(self, until: float) -> None:
        quiet = _Quiet(self._state(), self.now, self._meter.seconds, self._ksmd.counters().full_scans)
        while (wait := self._ksmd.next_wait()) < until - self.now:
            self._batch(wait, until)
            state, passes = self._state(), self._ksmd.counters().full_scans
            if state != quiet.state:
                quiet = _Quiet(state, self.now, self._meter.seconds, passes)
            elif passes - quiet.passes >= QUIET_PASSES:
                times = (until - self.now) / max(self.now - quiet.since, LEAST_SECONDS)
                self._skipped_passes += times * (passes - quiet.passes)
                self._skipped_cpu += times * (self._meter.seconds - quiet.cpu)
                break
        self.now = until

    def _batch(self, wait: float, until: float) -> None:
        """Run one batch of ksmd's, or as many as are worth a step."""
        spent, budget, times = self._meter.seconds, None, 1
        if self._ksmd.get("advisor_mode") != "cpu":
            each = max(int(self._ksmd.get("pages_to_scan")), 1) * self._fraction
            times = max(1, math.ceil(COALESCED_PAGES / each))
            if wait > 0:
                times = max(1, min(times, int((until - self.now) / wait)))
            budget = max(1, round(each * times))
        looked = self._ksmd.do_scan(budget)
        if budget is not None:
            # A pass may have ended before.
            times = max(1, math.ceil(times * min(looked / budget, 1.0)))
        self.now += max(wait * times + self._meter.seconds - spent, LEAST_SECONDS)

    def _state(self) -> tuple[object, ...]:
        counters = self._ksmd.counters()
        return (
            *(getattr(counters, name) for name in SCALED if name != "pages_scanned"),
            tuple(counters.merge_failures.values()),
        )

    def _moment(self) -> Moment:
        counters = self._ksmd.counters()
        return Moment(
            self.now,
            round(_saved(counters, self._setting.engine) / self._fraction),
            counters.cpu_seconds + self._skipped_cpu,
            {name: round(getattr(counters, name) / self._fraction) for name in SCALED},
        )


def _saved(counters: Counters, engine: Engine) -> int:
    if engine is Engine.KERNEL:
        return (counters.pages_sharing + counters.ksm_zero_pages) * PAGE_SIZE
    return counters.bytes_saved


@dataclass(frozen=True, slots=True)
class _Quiet:
    """Since when nothing has changed, and what had been spent by then."""

    state: tuple[object, ...]
    since: float
    cpu: float
    passes: int
