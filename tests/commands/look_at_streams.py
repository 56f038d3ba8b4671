"""Writes down what each standard stream is and how it is open."""

import fcntl
import os
import sys

found = []
for fd in range(3):
    try:
        found.append((os.readlink(f"/proc/self/fd/{fd}").partition(":[")[0], fcntl.fcntl(fd, fcntl.F_GETFL)))
    except OSError as e:
        found.append((str(e.strerror), 0))
with open(sys.argv[1], "w") as file:
    print(found, file=file)
