"""The kernel's own KSM, driven for processes that the agent cannot be in: `samepage run --engine kernel`, `attach`,
`detach`.

`target.py` says which processes it may serve, `attach.py` makes their memory mergeable, `unmerge.py` gives them copies
again, never more than there is memory for, and `settings.py` switches ksmd on and restores the settings that it found.
"""
