"""Whatever applications do and whatever goes wrong: no byte is lost, and the books balance."""

from __future__ import annotations

import errno
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from samepage.ksmd import UnmergeFailed, age, islands
from samepage.ksmd.mm_slot import MmSlot
from samepage.memory import PAGE_SIZE, AddressSpaceGone, PageStatus
from samepage.memory.simulated import SimulatedAddressSpace
from samepage.memory.simulated_memory import OutOfMemory, SimulatedMachine
from tests.ksmd.simulation import BASE, check, new_ksmd, passes

PAGES = 24
CONTENTS = st.integers(0, 5)
PAGE = st.integers(BASE, BASE + PAGES - 1)


class Oracle:
    """A process, and what it wrote."""

    def __init__(self, space: SimulatedAddressSpace, slot: MmSlot) -> None:
        self.space = space
        self.slot = slot
        self.written: dict[int, int] = {}

    def write(self, vpn: int, content: int) -> None:
        if self.space.alive:
            try:
                self.space.write(vpn, content)
            except OutOfMemory:
                return
            self.written[vpn] = content

    def discard(self, vpn: int, npages: int) -> None:
        self.space.discard(vpn, npages)
        self.written = {at: c for at, c in self.written.items() if not vpn <= at < vpn + npages}


class KsmdMachine(RuleBasedStateMachine):
    """Processes that come, write, fork, discard, unmap and go, and a ksmd at work among them."""

    everybody = Bundle("everybody")

    @initialize(
        memory=st.sampled_from([60, 150, 10_000]),
        bits=st.sampled_from([1, 3, 64]),
        tracking=st.booleans(),
        rehash=st.booleans(),
        sharing=st.sampled_from([2, 3, 256]),
        skipping=st.booleans(),
    )
    def begin(self, memory: int, bits: int, tracking: bool, rehash: bool, sharing: int, skipping: bool) -> None:
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(islands, "RUN_PAGES", 2)
        if skipping:  # what changes at all is skipped soon
            self.patched.setattr(age, "BLOCK_PAGES", 4)
            self.patched.setattr(age, "RESTLESS_PAGES", 1)
            self.patched.setattr(age, "SKIPS", np.array([0, 1, 2, 3], np.uint8))
        self.machine = SimulatedMachine(limit=memory)
        self.how: dict[str, Any] = {"hash_bits": bits, "tracking": tracking, "rehash_broken": rehash}
        self.ksmd = new_ksmd()
        self.ksmd.set("max_page_sharing", sharing)
        self.processes: list[Oracle] = []
        self.pid = 1

    def _enter(self, space: SimulatedAddressSpace) -> Oracle:
        oracle = Oracle(space, self.ksmd.enter(space))
        self.processes.append(oracle)
        return oracle

    def _new_pid(self) -> int:
        self.pid += 1
        return self.pid

    @rule(
        target=everybody, domain=st.integers(0, 1), limit=st.sampled_from([3, 8, 1000]), step=st.sampled_from([5, 99])
    )
    def join(self, domain: int, limit: int, step: int) -> Any:
        if len(self.processes) > 5:
            return multiple()
        space = SimulatedAddressSpace(
            self.machine, self._new_pid(), domain=domain, map_limit=limit, step=step, **self.how
        )
        space.map_area(BASE, PAGES)
        return self._enter(space)

    @rule(who=everybody, vpn=PAGE, contents=st.lists(CONTENTS, min_size=1, max_size=PAGES))
    def write(self, who: Oracle, vpn: int, contents: list[int]) -> None:
        for at, content in enumerate(contents, vpn):
            if at < BASE + PAGES:
                who.write(at, content)

    @rule(who=everybody, vpn=PAGE, npages=st.integers(1, PAGES))
    def discard(self, who: Oracle, vpn: int, npages: int) -> None:
        who.discard(vpn, npages)

    @rule(target=everybody, who=everybody)
    def fork(self, who: Oracle) -> Any:
        if not who.space.alive or len(self.processes) > 7:
            return multiple()
        child = self._enter(who.space.fork(self._new_pid()))
        child.written = dict(who.written)
        return child

    @rule(who=everybody, vpn=PAGE, npages=st.integers(1, 8))
    def unmap(self, who: Oracle, vpn: int, npages: int) -> None:
        who.space.unmap(vpn, npages)
        who.written = {at: c for at, c in who.written.items() if not vpn <= at < vpn + npages}

    @rule(who=everybody)
    def map_again(self, who: Oracle) -> None:
        covered = {start + i for start, n in who.space._areas for i in range(n)}
        for vpn in range(BASE, BASE + PAGES):
            if vpn not in covered:
                who.space.map_area(vpn, 1)

    @rule(who=everybody)
    def exit(self, who: Oracle) -> None:
        who.space.exit()
        who.written = {}
        self.processes = [p for p in self.processes if p is not who]

    @rule(who=everybody)
    def leave(self, who: Oracle) -> None:
        """The connection breaks; the process goes on, merged as it is."""
        self.ksmd.exit(who.slot)

    @rule(budget=st.integers(1, 50))
    def batch(self, budget: int) -> None:
        self.ksmd.do_scan(budget)

    @rule(n=st.integers(1, 4))
    def some_passes(self, n: int) -> None:
        if self.ksmd.get("run") == "1":
            passes(self.ksmd, n)

    @rule(who=everybody, vpn=PAGE, npages=st.integers(1, PAGES))
    def merge_now(self, who: Oracle, vpn: int, npages: int) -> None:
        if self.ksmd.get("run") == "2":
            with pytest.raises(OSError, match="busy"):
                self.ksmd.merge_range(who.slot, vpn, npages)
            return
        try:
            self.ksmd.merge_range(who.slot, vpn, npages)
        except AddressSpaceGone:
            assert who.slot.is_away

    @rule(who=everybody)
    def recount(self, who: Oracle) -> None:
        self.ksmd.recount_zeros(who.slot)
        zeros = sum(row.ksm_zero_pages for row in self.ksmd.rows() if row.pid == who.space.pid)
        assert (
            zeros <= len([p for p in who.space._pages.values() if p.merged and p.segment is None])
            or not who.space.alive
        )

    @rule(who=everybody, vpn=PAGE, npages=st.integers(1, PAGES))
    def unmerge_some(self, who: Oracle, vpn: int, npages: int) -> None:
        result = self.ksmd.unmerge(who.slot, vpn, npages)
        assert result.errno in (0, errno.ENOMEM, errno.ETIMEDOUT)
        assert result.errno != errno.ETIMEDOUT or who.space.halt
        if not result.errno and not who.slot.is_away:
            assert not who.space.merged_pages() & set(range(vpn, vpn + npages))

    @rule(after=st.integers(0, 6))
    def unmerge_all(self, after: int) -> None:
        asked = iter(range(1000))
        failed = None
        try:
            self.ksmd.set("run", 2, cancelled=lambda: after < 6 and next(asked) >= after)
        except UnmergeFailed as error:
            failed = error.errno
        assert self.machine.used <= self.machine.limit
        assert failed in (None, errno.ENOMEM, errno.EINTR, errno.ETIMEDOUT)
        if failed:
            assert self.ksmd.get("run") == "0"
            return
        for who in self.processes:
            if who.space.alive and not who.slot.gone:
                assert not who.space.merged_pages()
        assert not [s for s in self.machine.segments.values() if s.is_open]

    @rule(run=st.integers(0, 1))
    def start_or_stop(self, run: int) -> None:
        self.ksmd.set("run", run)

    @rule(who=everybody, seed=st.integers(0, 1000), chance=st.sampled_from([0.02, 0.3]))
    def misfortune(self, who: Oracle, seed: int, chance: float) -> None:
        """From now on things happen inside the calls of ksmd: writes, and failures of every kind."""
        dice = random.Random(seed)

        def script(what: str, vpn: int) -> int | None:
            if dice.random() > chance:
                return None
            kind = dice.randrange(6)
            if kind == 0:
                who.write(dice.randrange(BASE, BASE + PAGES), dice.randrange(6))
            elif kind == 1 and what != "scan":
                who.discard(dice.randrange(BASE, BASE + PAGES), 1)
            elif what in ("break", "restore"):
                return dice.choice([errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.EFAULT])
            elif what in ("donate", "merge"):
                return dice.choice([s for s in PageStatus if s not in (PageStatus.DONE, PageStatus.DIFFERENT)])
            elif kind == 5 and dice.random() < 0.1:
                raise AddressSpaceGone("scripted")
            return None

        who.space.script = script

    @rule(who=everybody)
    def halt(self, who: Oracle) -> None:
        """It cannot answer until good fortune returns."""
        if who.space.alive:
            who.space.halt = "stopped"

    @rule(who=everybody)
    def move(self, who: Oracle) -> None:
        """It belongs in another domain."""
        who.space.elsewhere = "elsewhere"
        self.ksmd.look_again()

    @rule()
    def fortune(self) -> None:
        for who in self.processes:
            who.space.script = None
            who.space.halt = who.space.elsewhere = ""

    @invariant()
    def nothing_is_lost(self) -> None:
        for who in self.processes:
            assert who.space.pages() == who.written

    @invariant()
    def the_books_balance(self) -> None:
        check(self.ksmd, self.machine, {who.slot: who.space for who in self.processes})

    @invariant()
    def memory_is_within_bounds(self) -> None:
        """Merging never takes more than it gives, but for segments some of whose pages went out of use."""
        dead = sum(
            s.npages - len({p.offset for w in self.processes for p in w.space._pages.values() if p.segment is s})
            for s in self.machine.segments.values()
        )
        assert self.machine.used <= min(self.machine.limit, self.machine.unmerged + dead)

    def teardown(self) -> None:
        """When all is quiet, what is claimed to be saved is what is saved; and it can all be undone."""
        if not hasattr(self, "machine"):
            return
        self.fortune()
        self.machine.limit = 1 << 40
        self.ksmd.set("run", 1)
        passes(self.ksmd, 4 + int(age.SKIPS[-1]))
        self.patched.undo()
        self.nothing_is_lost()
        self.the_books_balance()
        assert self.ksmd.counters().bytes_saved <= self.machine.saved * PAGE_SIZE
        self.ksmd.set("run", 2)
        self.nothing_is_lost()
        for who in self.processes:
            if who.space.alive and not who.slot.gone:
                assert not who.space.merged_pages()


KsmdMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestKsmd = pytest.mark.timeout(300)(KsmdMachine.TestCase)
