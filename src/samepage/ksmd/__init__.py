"""ksmd: kernel samepage merging's algorithm, over address spaces it knows only through one protocol.

How it works, in the order the modules should be read:

Every process that takes part is an *mm_slot* (`mm_slot`) in a list that a cursor goes round (`mm_list`). A *pass*
(`passes`) is over when the cursor has looked at all of them; then `full_scans` (seqnr) goes up by one. A *look*
(`look`) costs little: a process hashes only the pages that were written since it was last looked at, so a pass over
memory in which nothing happened is one message a process, and no work at all a page.

What is remembered of a page is nine bytes (`rmap`): a checksum and a state. A page whose checksum is new is
*volatile*; if it stays the same for one whole pass, it is a *candidate*. Candidates are matched when the pass is over
(`slices`, `match`, `merge`), a hundred thousand at once and in the order of memory, in two indexes (`index`):

- the *stable* one holds pages of *segments* (`stable`): sealed copies, which can never change, of pages that were
  found more than once. A page in it is a stable node, and it is there to be merged with.
- the *unstable* one holds the checksums of ordinary pages that were found once. They can change at any moment, so an
  entry is only a hint. mm/ksm.c has to throw its unstable tree away after every pass, since it cannot know which of
  the pages changed and left the tree in disorder. Here it is known: what was written is reported, and goes out of
  the index before its new checksum goes in. The index is never in disorder and need never be rebuilt.

A candidate that is in the stable index is merged with the node found. One that has its equal among the candidates or
in the unstable index makes that one a *donor*: its page is copied into a new segment, and both are merged with the
copy. All others go to the unstable index. Nothing of this rests on the checksums being right, nor on anything a
process says of its pages: before a page is replaced, its own process compares all its bytes with the segment's, which
nobody can change. Where they differ, the page is left alone until it has another checksum.

Neighbouring pages that have neighbouring equals are merged as one *extent*, which takes one mapping. Mappings are a
process's scarcest resource (`vm.max_map_count`). If there are too few, they go where they save most. Pages that
could not be merged for this or another temporary reason are tried again after one pass, then two, then four
(`deferred`).

Merged pages become private again when the process writes them (the kernel sees to that, and the next scan tells us), or
when somebody asks for it (`unmerge`, `unmerge_all`): a process for its own memory, or a user who sets `run` to 2 for
all. That takes memory. If there is none, the unmerge stops with ENOMEM; what was not done stays merged and known.

Merge domains (`domain`) have nothing in common but the cursor. A process that turns out to belong in another domain
takes nothing along (`places`). `knobs`, `counters` and `advisor` are those of /sys/kernel/mm/ksm. `memory.check` stands
between ksmd and everything a process answers. `ksmd` puts it together.

Memory: 9 bytes for each page that was told of, and as much for up to seven neighbours of one that lies alone, with 24
to 40 for where it is (`pieces`); 4 more while it stands in the unstable index (or waits to be looked at again), 13 for
each stable node (14 once one has more than 255 sharers). A node has two sharers at least, nearly always; so less than
16 bytes a page where memory is in use as a whole.
"""

from samepage.ksmd.advisor import Advisor
from samepage.ksmd.counters import Counters, ProcessRow
from samepage.ksmd.knobs import KNOBS, Knobs, Run
from samepage.ksmd.ksmd import Ksmd, UnmergeFailed
from samepage.ksmd.mm_slot import MmSlot
from samepage.ksmd.on_request import MergeOutcome
from samepage.ksmd.rmap import PageState
from samepage.ksmd.unmerge import ProcessBreak, UnmergeResult

__all__ = [
    "KNOBS",
    "Advisor",
    "Counters",
    "Knobs",
    "Ksmd",
    "MergeOutcome",
    "MmSlot",
    "PageState",
    "ProcessBreak",
    "ProcessRow",
    "Run",
    "UnmergeFailed",
    "UnmergeResult",
]
