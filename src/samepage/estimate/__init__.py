"""`samepage scan`: finds out from outside what merging would save, without stopping or changing anything.

A *source* (`process`, `image`; which of them: `selection`) says which pages there are, and what the kernel says of
each. `look` reads and hashes the pages of all sources, a few batches at a time on all cores (`pages`, and pages.c), and
keeps a checksum and a byte of flags of each. `groups` finds the equal ones. `predict` works out what the kernel's KSM
and what samepage would make of them; `watch` compares two looks. All of that is arrays. `report` makes one value of
them, which becomes the JSON; `text` shows it on a terminal, and `html` on a page with a map of the memory.

What counts as new savings
    A page of physical memory is a *frame*, and one that several pages are mapped from (by fork, or because they were
    merged) is shared already. So savings are counted in frames: of a group of equal pages all frames but one can go,
    if nobody but those looked at maps them. What KSM's own counters would show is another number, since it counts
    mappings: that is predicted too, because it can be compared with the kernel.

Memory: 14 bytes a page (checksum, flags, class, and the copy it would be merged with), 4 more for each page that shares
a frame and for each run of pages, and a sixteenth of the columns while groups are sought.
"""
