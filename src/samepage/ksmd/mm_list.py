"""The list of processes and the cursor that goes round it (ksm_mm_head, struct ksm_scan), and their domains."""

from __future__ import annotations

import threading

from samepage.ksmd import books
from samepage.ksmd.domain import Domain
from samepage.ksmd.lost import Lost
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.patience import Accounts
from samepage.ksmd.quota import Quotas
from samepage.memory import AddressSpace
from samepage.process.merge_domain import MergeDomain


class MmList:
    """Processes join and leave at any time; ksmd takes that in between two steps (`reap`).

    Any thread may call `enter`, `slots`, `everybody`, `after` and `domains`. All else is touched under `Ksmd.mutex`
    only. `owner` is the user whose service it is (see `Accounts`).
    """

    def __init__(self, owner: int | None) -> None:
        self.lost = Lost()
        self.cursor: dict[MmSlot, int] = {}
        """Slots of this pass that are not yet looked at to the end, and the page to go on at."""
        self.carried: dict[MmSlot, int] = {}
        """The same for slots that had no turn in the last pass."""
        self.in_pass = False
        self.departed_cpu_ns = 0
        """CPU time of processes that left."""
        self._accounts = Accounts(owner)
        self._quotas = Quotas(owner)
        self._lock = threading.Lock()  # ksm_mmlist_lock: guards what follows, and is held for moments only
        self._slots: dict[int, MmSlot] = {}  # by number, ascending
        self._joining: list[MmSlot] = []
        self._domains: dict[MergeDomain, Domain] = {}
        self._next_number = 1

    def enter(self, space: AddressSpace, comm: str, swap: str) -> MmSlot:
        """Put a process at the end of the list (__ksm_enter)."""
        with self._lock:
            slot = MmSlot(space, self._domain_of(space.domain), self._next_number, comm, swap)
            self._next_number += 1
            self._slots[slot.number] = slot
            slot.owed = self.lost.forget(slot.pid)
            for before in [s for s in self._slots.values() if s.pid == slot.pid and s is not slot]:
                slot.owed += before.owed  # it is not forgotten yet
                before.astray = False
            self._joining.append(slot)
        return slot

    def _domain_of(self, key: MergeDomain) -> Domain:
        if key not in self._domains:
            account, foreign = self._accounts.of(key.user), self._accounts.is_foreign(key.user)
            self._domains[key] = Domain(key, account, foreign, self._quotas.of(key.user))
        return self._domains[key]

    def slots(self, pid: int | None = None) -> list[MmSlot]:
        """The slots that take part, or those of them with that pid."""
        with self._lock:
            return [slot for slot in self._slots.values() if not slot.gone and pid in (None, slot.pid)]

    def everybody(self) -> list[MmSlot]:
        """The same, including those that left and are not forgotten yet."""
        with self._lock:
            return list(self._slots.values())

    def for_a_pass(self) -> list[MmSlot]:
        """The slots that a pass begins with: those that join are put into it as soon as they are taken in."""
        with self._lock:
            return [slot for slot in self._slots.values() if not slot.gone and slot not in self._joining]

    def after(self, number: int) -> MmSlot | None:
        """The process that follows `number` in the list, whoever joined or left meanwhile."""
        with self._lock:
            return next((slot for n, slot in self._slots.items() if n > number and not slot.gone), None)

    def domains(self) -> list[Domain]:
        """All domains that have processes."""
        with self._lock:
            return list(self._domains.values())

    @property
    def is_empty(self) -> bool:
        """Whether no process is there."""
        return not self._slots

    @property
    def is_joined(self) -> bool:
        """Whether somebody joined and is not taken in yet."""
        return bool(self._joining)

    def reap(self) -> None:
        """Take in the processes that joined, and forget those that left. Only between two steps, when no refs are in
        hand."""
        with self._lock:
            joining, self._joining = self._joining, []
            gone = [slot for slot in self._slots.values() if slot.gone]
            for slot in joining:
                slot.domain.slots.append(slot)
        for slot in joining:
            if self.in_pass:
                self.cursor[slot] = 0
        for slot in gone:
            self._forget(slot)
        if gone:
            with self._lock:
                named = {slot.domain.key for slot in self._slots.values()}
                for key in [k for k in self._domains if k not in named]:
                    self._domains.pop(key).release()

    def _forget(self, slot: MmSlot) -> None:
        self.lost.note(slot)
        slot.domain.drop(slot)  # if that fails, the slot is here still, and the next `reap` begins again
        self.cursor.pop(slot, None)
        self.carried.pop(slot, None)
        self.departed_cpu_ns += slot.cpu_ns
        with self._lock:
            del self._slots[slot.number]

    def to_the_head(self) -> None:
        """Put the cursor back to the head: the current pass does not count."""
        self.cursor, self.carried = {}, {}
        self.in_pass = False

    def mend(self) -> None:
        """Make the books agree after a defect of ksmd's, which may have ended a change in the middle."""
        for domain in self.domains():
            books.mend(domain)
