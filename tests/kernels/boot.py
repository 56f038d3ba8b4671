"""A kernel of Debian's, booted in QEMU with this machine's own files for its root.

The package is unpacked, not installed. The root is this machine's, read-only over 9p, under an overlay in memory; so
what is installed here, the virtual environment too, is there at the same place. The processor is emulated, for KVM
cannot be relied on in containers and virtual machines, and has no AVX2, which QEMU 7.2 emulates wrongly.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODULES = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "netfs",
    "fscache",
    "9pnet",
    "9pnet_virtio",
    "9p",
    "overlay",
    "fuse",
]
"""What the root needs and Debian builds as modules. Which needs which differs, so all are tried again."""

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for try in 1 2 3; do for module in {modules}; do insmod /lib/$module.ko 2>/dev/null; done; done
mkdir -p /lower /memory /root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose root /lower || echo no 9p
mount -t tmpfs -o size=60% memory /memory; mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/lower,upperdir=/memory/upper,workdir=/memory/work root /root || echo no overlay
for at in proc sys dev; do mount --move /$at /root/$at; done
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs shm /root/dev/shm; mount -t tmpfs tmp /root/tmp; mount -t tmpfs run /root/run
mount -t devpts pts /root/dev/pts
mount -t cgroup2 cgroup /root/sys/fs/cgroup
echo +memory > /root/sys/fs/cgroup/cgroup.subtree_control
ip link set lo up
chroot /root /bin/sh -c {command} 2>&1
echo "ENDED $?"
poweroff -f
"""

ENDED = re.compile(rb"^ENDED (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked package."""

    release: str
    image: Path
    modules: dict[str, Path]


def unpack(package: str, folder: Path) -> Kernel:
    """Fetch a package of Debian's by its name, or take a file, and unpack it into `folder` if it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("boot/vmlinuz-*")):
        file = Path(package)
        if not file.exists():
            subprocess.run(["apt-get", "--quiet", "download", package], cwd=folder, check=True)
            file = next(folder.glob("*.deb"))
        subprocess.run(["dpkg-deb", "--extract", str(file), str(folder)], check=True)
    image = next(folder.glob("boot/vmlinuz-*"))
    found = {path.name.partition(".ko")[0].replace("-", "_"): path for path in folder.rglob("*.ko*")}
    return Kernel(image.name.removeprefix("vmlinuz-"), image, {name: found[name] for name in MODULES if name in found})


def boot(
    kernel: Kernel,
    command: str,
    folder: Path,
    memory: int = 2048,
    timeout: float = 600,
    options: str = "",
) -> tuple[int, str]:
    """Run a shell command as root there. Its exit status, -1 if it did not end in time or the machine did not come up,
    and what it printed."""
    initrd = folder / f"initrd-{kernel.release}.gz"
    _make_initrd(kernel, initrd, command)
    machine = [
        *("nice", "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "Westmere"),
        *("-smp", "2", "-m", str(memory), "-nographic", "-no-reboot", "-nic", "none"),
        *("-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd)),
        *("-append", f"console=ttyS0 quiet panic=-1 {options}"),
    ]
    process = subprocess.Popen(machine, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    ended = ENDED.search(said)
    return int(ended[1]) if ended else -1, said.decode(errors="replace").replace("\r", "")


def _make_initrd(kernel: Kernel, target: Path, command: str) -> None:
    root = target.with_suffix(".root")
    shutil.rmtree(root, ignore_errors=True)
    for name in ("bin", "lib", "proc", "sys", "dev"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
    for name, path in kernel.modules.items():
        data = path.read_bytes()
        (root / "lib" / f"{name}.ko").write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
    init = root / "init"
    init.write_text(INIT.format(modules=" ".join(MODULES), command=shlex.quote(command)))
    init.chmod(0o755)
    files = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
    archive = subprocess.run(
        ["cpio", "--create", "--format=newc", "--quiet"],
        cwd=root,
        input=files.encode(),
        capture_output=True,
        check=True,
    )
    with gzip.open(target, "wb", compresslevel=1) as file:
        file.write(archive.stdout)
    shutil.rmtree(root)


def available() -> str:
    """What is missing to boot anything; "" if nothing is."""
    missing = [
        name for name in ("qemu-system-x86_64", "busybox", "cpio", "dpkg-deb", "apt-get") if not shutil.which(name)
    ]
    if os.uname().machine != "x86_64":
        missing.append("an x86-64 machine")
    return ", ".join(missing)
