"""The kernel's own KSM, driven for processes that the agent cannot be in: `samepage run --engine kernel`, `attach`,
`detach`.

`target.py` says whom it is for, `attach.py` makes their memory mergeable, `unmerge.py` gives them copies again, never
more than there is memory for, `settings.py` switches ksmd on and puts back what it found.
"""
