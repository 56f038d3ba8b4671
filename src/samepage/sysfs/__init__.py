"""KSM's own interface: the files of /sys/kernel/mm/ksm and of /proc/PID, for programs that know the kernel's KSM.

What the files are called, show and take is in `samepage.service.ksm_files`. A process of its own, in C, is what the
kernel asks for them (`sysfs.h` tells why); `mount` starts it, and `namespace` puts the tree where a command of
`samepage run --sysfs` looks for it.
"""
