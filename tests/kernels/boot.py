"""A kernel of Debian's, booted in QEMU with this machine's own files for its root.

The package is unpacked, not installed. The root is this machine's, read-only over 9p, under an overlay in memory; so
what is installed here, the virtual environment too, is there at the same place. There are two NUMA nodes, and a disk
for swap. The processor is emulated, for KVM cannot be relied on in containers and virtual machines, by the QEMU of
bookworm-backports where that can be had: 7.2 emulates cmpxchg16b wrongly, on which newer kernels crash, and AVX2, so
the processor has none.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.archive import Archive
from tests.kernels.network import MODULES as LATER

MODULES = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "netfs",
    "fscache",
    "9pnet",
    "9pnet_virtio",
    "9p",
    "overlay",
    "fuse",
]
"""What the root needs and Debian builds as modules. Which needs which differs, so all are tried again."""

SWAP = 256 << 20

NICE = 10
"""An emulated processor takes all it can get."""

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
mount -t tmpfs shm /root/dev/shm; mount -t tmpfs run /root/run
case {checkout} in /tmp/*) ;; *) mount -t tmpfs tmp /root/tmp ;; esac
mount -t devpts pts /root/dev/pts
mount -t cgroup2 cgroup /root/sys/fs/cgroup
echo +memory > /root/sys/fs/cgroup/cgroup.subtree_control
chmod 666 /root/dev/null /root/dev/zero /root/dev/urandom
ip link set lo up
echo always > /root/sys/kernel/mm/transparent_hugepage/enabled
mkswap /root/dev/vda >/dev/null 2>&1; swapon /root/dev/vda
chroot /root /bin/sh -c {command} 2>&1
echo "ENDED $?"
poweroff -f
"""

ABORTED = re.compile(rb"(msix_table_mmio_write|iotlb_to_section): Assertion")
ENDED = re.compile(rb"^ENDED (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked package."""

    release: str
    image: Path
    modules: dict[str, Path]


def unpack(archive: Archive, package: str, folder: Path) -> Kernel:
    """A package of Debian's by its name, or a file, unpacked into `folder` if it is not there yet."""
    if not _image(folder):
        archive.unpack(package, folder)
        if not _image(folder):  # from 7.0 on it is in packages of its own
            for part in ("linux-modules", "linux-binary"):
                archive.unpack(Path(package).name.replace("linux-image", part), folder)
    image = _image(folder)
    if image is None:
        raise OSError(f"{package}: there is no kernel in it")
    release = image.name.removeprefix("vmlinuz-") if image.name != "vmlinuz" else image.parent.name
    found = {path.name.partition(".ko")[0].replace("-", "_"): path for path in folder.rglob("*.ko*")}
    return Kernel(release, image, {name: found[name] for name in [*MODULES, *LATER] if name in found})


def _image(folder: Path) -> Path | None:
    return next((path for form in ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz") for path in folder.glob(form)), None)


def emulator(archive: Archive) -> list[str]:
    """The command that runs the newest QEMU to be had: what is installed, or, with its libraries, that of backports."""
    root = archive.folder / "qemu"
    program = root / "usr/bin/qemu-system-x86_64"
    if not program.exists():
        with contextlib.suppress(OSError):
            for name in ("qemu-system-common", "qemu-system-data", "qemu-system-x86"):
                archive.unpack(name, root, "bookworm-backports")
    modules = f"QEMU_MODULE_DIR={root}/usr/lib/x86_64-linux-gnu/qemu"
    command = ["env", modules, str(program), "-L", str(root / "usr/share/qemu"), "-L", "/usr/share/seabios"]
    with contextlib.suppress(OSError):
        if not subprocess.run([*command, "--version"], capture_output=True).returncode:
            return command
    return ["qemu-system-x86_64"]


def apparmor_parser(archive: Archive) -> str:
    """The path of that program; "" if it is not to be had."""
    root = archive.folder / "apparmor"
    with contextlib.suppress(OSError):
        if not root.exists():
            archive.unpack("apparmor", root, "bookworm")
        return next((str(path) for path in root.glob("**/sbin/apparmor_parser")), "")
    return ""


def boot(
    qemu: list[str], kernel: Kernel, command: str, folder: Path, timeout: float = 600, options: str = ""
) -> tuple[int, str]:
    """Run a shell command as root there. Its exit status, -1 if it did not end in time or the machine did not come up,
    and what it printed, which also is in a file of `folder` while it runs."""
    initrd, swap = folder / f"initrd-{kernel.release}.gz", folder / "swap"
    _make_initrd(kernel, initrd, command)
    with swap.open("wb") as file:
        file.truncate(SWAP)
    machine = [
        *("nice", "-n", str(max(0, NICE - os.nice(0))), *qemu),
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "Westmere"),
        *("-smp", "2", "-m", "2048", "-nographic", "-no-reboot", "-nic", "none"),
        *("-object", "memory-backend-ram,size=1G,id=m0", "-object", "memory-backend-ram,size=1G,id=m1"),
        *("-numa", "node,nodeid=0,cpus=0,memdev=m0", "-numa", "node,nodeid=1,cpus=1,memdev=m1"),
        *("-drive", f"file={swap},format=raw,if=virtio,cache=unsafe"),
        *("-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd)),
        *("-append", f"console=ttyS0 quiet panic=-1 no_timer_check mitigations=off {options}"),
    ]
    log = folder / f"{kernel.release}.log"
    said = _run(machine, log, timeout)
    if ABORTED.search(said):  # 10.0.2 does, once in a while, at the start or when the kernel sets up its devices
        said = _run(machine, log, timeout)
    ended = ENDED.search(said)
    return int(ended[1]) if ended else -1, said.decode(errors="replace").replace("\r", "")


def _run(machine: list[str], log: Path, timeout: float) -> bytes:
    """What it printed until it ended, or was ended."""
    with log.open("wb") as file:
        process = subprocess.Popen(machine, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return log.read_bytes()


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
    init.write_text(
        INIT.format(checkout=Path(__file__).parents[2], modules=" ".join(MODULES), command=shlex.quote(command))
    )
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
