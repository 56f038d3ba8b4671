"""A service with no patience: merges whatever looks equal, at once and without end, breaks it again, and restores it.

ksmd waits until a page stood still for a pass and then leaves it alone. This does the opposite, to meet writers
in the middle of a swap as often as can be: what it merges is what was written a moment ago.

    python storm.py SOCKET [SWAP_WP|NO_TRACKING|NO_MAP_QUERY|TRUNCATE_HASH|LIKE_6_1|LIKE_5_10|UNPINNED|HUGE]...

Serves until SIGTERM, then prints what became of all pages it asked for, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import struct
import sys
from collections import Counter

import numpy as np

from samepage.memory import AREA, EXTENT, ZERO_PAGE, AddressSpaceGone, PageStatus, RunKind, conversation, wire
from samepage.memory.agent import DONATE_MAX, RUNS_MAX, AgentAddressSpace
from samepage.memory.handshake import Terms
from samepage.process.merge_domain import MergeDomain

SECTION_PAGES = 16
"""Pages in a critical section: 64 KiB, where the move conflicts with writers most."""


HUGE = 512
"""Pages of a huge page."""

EXTENTS = 64
"""In one request: what is asked for at once is counted when all of it is done, which may take minutes."""


def look(space: AgentAddressSpace, tally: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pages written since the last look and their checksums."""
    vpns, sums, vpn = [np.empty(0, "<u8")], [np.empty(0, "<u8")], 0
    while True:
        found = space.scan(vpn, 1 << 20)
        for run in found.runs:
            tally[RunKind(int(run["kind"])).name] += int(run["npages"])
            if run["kind"] == RunKind.HASHED:
                vpns.append(np.arange(run["vpn"], run["vpn"] + run["npages"], dtype="<u8"))
        sums.append(found.checksums)
        vpn = found.next_vpn
        if not vpn:
            return np.concatenate(vpns), np.concatenate(sums)


def runs_of(vpns: np.ndarray) -> np.ndarray:
    """Ascending page numbers as runs of dtype AREA."""
    cuts = np.flatnonzero(np.diff(vpns) != 1) + 1
    starts = np.concatenate(([0], cuts)).astype(int)
    ends = np.concatenate((cuts, [len(vpns)])).astype(int)
    return np.array([(vpns[a], b - a) for a, b in zip(starts, ends, strict=True)], AREA)


def extents_of(vpns: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Pages and the segment pages they are to become, as extents."""
    zero = offsets == ZERO_PAGE
    step = np.where(zero[1:], 0, 1).astype("<u8")
    cuts = np.flatnonzero((np.diff(vpns) != 1) | (offsets[1:] - offsets[:-1] != step) | (zero[1:] != zero[:-1])) + 1
    starts = np.concatenate(([0], cuts)).astype(int)
    extents = np.empty(len(starts), EXTENT)
    extents["vpn"], extents["offset"] = vpns[starts], offsets[starts]
    extents["npages"] = np.diff(np.concatenate((starts, [len(vpns)])))
    return extents


def merge_equal(spaces: list[AgentAddressSpace], tally: Counter[str], rng: random.Random) -> None:
    """Look at all of `spaces` and merge what looks equal with what one of them donates."""
    looks = [look(space, tally) for space in spaces]
    donor = rng.randrange(len(spaces))
    vpns, sums = looks[donor]
    if not len(vpns):
        return
    chosen = np.sort(np.unique(sums, return_index=True)[1])[:DONATE_MAX]
    donation = spaces[donor].donate(runs_of(vpns[chosen]))
    tally.update(f"donate {PageStatus(int(s)).name}" for s in donation.status)
    if donation.segment is None:
        return
    try:
        kept = sums[chosen][donation.status == PageStatus.DONE]
        order = np.argsort(kept)
        for space, (vpns, sums) in zip(spaces, looks, strict=True):
            at = np.minimum(np.searchsorted(kept[order], sums), len(kept) - 1)
            offsets = order[at].astype("<u8")
            found = kept[offsets] == sums
            offsets[sums == space.zero_checksum] = ZERO_PAGE
            found |= offsets == ZERO_PAGE
            extents = extents_of(vpns[found], offsets[found]) if found.any() else np.empty(0, EXTENT)
            for done in range(0, len(extents), EXTENTS):
                result = space.merge(donation.segment, extents[done : done + EXTENTS])
                counts = np.bincount(result.status, minlength=len(PageStatus))
                tally.update({f"merge {status.name}": int(counts[status]) for status in PageStatus})
    finally:
        donation.segment.close()


def merge_huge(space: AgentAddressSpace, rng: random.Random, tally: Counter[str]) -> None:
    """Have what can be a huge page merged with a copy of itself, in one piece."""
    for area in space.areas().ranges:
        start, end = int(area["vpn"]), int(area["vpn"] + area["npages"])
        for vpn in range(-(-start // HUGE) * HUGE, end - HUGE + 1, HUGE):
            if rng.random() < 0.5:
                continue
            donation = space.donate(np.array([(vpn, HUGE)], AREA))
            if donation.segment is None:
                continue
            if (donation.status == PageStatus.DONE).all():
                result = space.merge(donation.segment, np.array([(vpn, HUGE, 0)], EXTENT))
                counts = np.bincount(result.status, minlength=len(PageStatus))
                tally.update({f"huge {status.name}": int(counts[status]) for status in PageStatus})
            donation.segment.close()


def break_range(space: AgentAddressSpace, vpn: int, npages: int, tally: Counter[str]) -> None:
    broken = space.break_ksm(vpn, npages)
    tally["break"] += broken.pages_unmerged
    tally[f"break errno {broken.errno}"] += 1


def break_some(space: AgentAddressSpace, rng: random.Random, tally: Counter[str]) -> None:
    areas = space.areas().ranges
    if len(areas):
        area = areas[rng.randrange(len(areas))]
        first = rng.randrange(int(area["npages"]))
        break_range(space, int(area["vpn"]) + first, rng.randint(1, int(area["npages"]) - first), tally)


def restore_all(space: AgentAddressSpace, tally: Counter[str]) -> None:
    """What was merged and then written is to be memory like any other again."""
    areas = space.areas().ranges
    if len(areas):
        result = space.restore(areas[:RUNS_MAX])
        tally["restored"] += result.pages_restored
        tally["not restored"] += result.pages_left


def break_all(space: AgentAddressSpace, tally: Counter[str]) -> None:
    for area in space.areas().ranges:
        break_range(space, int(area["vpn"]), int(area["npages"]), tally)


def main() -> None:
    path, flags, often_huge = sys.argv[1], wire.Flags(0), 0.5
    conversation.TIMEOUT *= float(os.environ.get("STORM_PATIENCE", "1"))  # on a machine that is as many times as slow
    for name in sys.argv[2:]:
        if name == "HUGE":
            often_huge = 0.95
        else:
            flags |= wire.Flags[name]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    print("ready", flush=True)
    spaces: list[AgentAddressSpace] = []
    tally: Counter[str] = Counter()
    rng = random.Random(1)
    while not stopped:
        while select.select([listener], [], [], 0.0 if spaces else 0.2)[0]:
            sock, _ = listener.accept()
            pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            try:
                terms = Terms(flags=flags, section=SECTION_PAGES)
                sock.settimeout(5)
                spaces.append(AgentAddressSpace.welcome(sock, wire.recv(sock), pid, MergeDomain(os.getuid()), terms))
                tally[f"joined as {spaces[-1].swap.name}"] += 1
            except (AddressSpaceGone, wire.WireError, OSError):
                sock.close()
        some = rng.sample(spaces, min(len(spaces), 4))
        with contextlib.suppress(AddressSpaceGone):
            if some:
                if rng.random() < often_huge:
                    merge_huge(rng.choice(some), rng, tally)
                else:
                    merge_equal(some, tally, rng)
                tally["rounds"] += 1
                if rng.random() < 0.3:
                    break_some(rng.choice(some), rng, tally)
                if rng.random() < 0.5:
                    restore_all(rng.choice(some), tally)
                if rng.random() < 0.1:
                    break_all(rng.choice(some), tally)
        gone = [s for s in spaces if s._gone is not None]
        for space in gone:
            # A process that exits is expected; an agent that ends the talk for another reason is not.
            tally[f"left: {str(space._gone)[:60]}"] += 1
            space.close()
        spaces = [s for s in spaces if s not in gone]
    print(json.dumps(dict(sorted(tally.items()))), flush=True)


if __name__ == "__main__":
    main()
