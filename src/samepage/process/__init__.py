"""A process as the kernel describes it in /proc: whose it is, what keeps it from running, what its mappings are.

Nothing here imports numpy, which takes a tenth of a second: `samepage attach` is to be done by then.
"""
