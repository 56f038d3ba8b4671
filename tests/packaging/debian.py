"""The Debian package on a Debian of its own: built, installed, booted. As root, with debootstrap and systemd-container.

    python -m tests.packaging.debian bookworm trixie

For each release two systems are made in build/debian: one that the package is built in, and a clean one that it is
installed in. There its man page is opened, completion completes in bash, zsh and fish, and systemd looks at the unit.
Then the clean one is booted, and processes of two users join the daemon that systemd starts for them, and are merged.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/debian"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

BUILD = "make gcc libc6-dev libxxhash-dev libfuse3-dev libjansson-dev pkgconf fuse3 python3-venv dpkg-dev"
CLEAN = "man-db bash-completion zsh fish systemd-sysv dbus procps"

LOOK = r"""
set -eu
samepage --version
MANPAGER=cat man --warnings samepage-daemon | grep -q -- --metrics
bash -c 'source /usr/share/bash-completion/completions/samepage; COMP_WORDS=(samepage st); COMP_CWORD=1
	_shtab_samepage samepage; test "${COMPREPLY[*]}" = status'
fish -c 'complete -C "samepage st"' | grep -q ^status
zsh -f -c 'autoload -Uz compinit; compinit -u -D; test "$_comps[samepage]" = _samepage'
systemd-analyze verify samepage.service samepage.socket
systemd-analyze security --offline=true --threshold=30 /usr/lib/systemd/system/samepage.service >/dev/null
"""

BOOTED = r"""
systemctl enable --now samepage.socket
for user in 0 0 1000 1000; do
	setpriv --reuid $user --regid $user --clear-groups samepage run -- python3 -c "
import time
block = b''.join(n.to_bytes(4096, 'little') for n in range(1, 8192))
time.sleep(45)" &
done
for second in $(seq 40); do
	sleep 1
	samepage status --json >/result.new && mv /result.new /result
	test $(cat /result | grep -c '"merged": 8[0-9][0-9][0-9],') -lt 4 || break
done
systemctl --quiet is-active samepage.service && touch /active
systemctl poweroff --force --force
"""

UNIT = """[Unit]
After=multi-user.target
[Service]
ExecStart=/bin/bash /booted
[Install]
WantedBy=graphical.target
"""


def inside(system: Path, script: str) -> None:
    """Run a script in a system, as root."""
    mounts = ["mount -t proc proc /proc", "mount -t devtmpfs dev /dev", "mount -t devpts pts /dev/pts"]
    mounts.append("export DEBIAN_FRONTEND=noninteractive")
    command: list[str | Path] = ["unshare", "--mount", "chroot", system, "bash", "-ec", "\n".join([*mounts, script])]
    subprocess.run(command, check=True, env=os.environ | {"LC_ALL": "C.UTF-8"})


def system(release: str, name: str, packages: str) -> Path:
    """A fresh one with these packages besides."""
    base, path = FOLDER / release, FOLDER / f"{release}-{name}"
    if not base.exists():
        mirror = "http://deb.debian.org/debian"
        subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=python3,ca-certificates", release, base, mirror],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    shutil.rmtree(path, ignore_errors=True)
    subprocess.run(["cp", "-a", base, path], check=True)
    shutil.copy("/etc/resolv.conf", path / "etc/resolv.conf")
    shutil.copy(CERTIFICATES, path / str(CERTIFICATES).lstrip("/"))
    inside(path, f"apt-get -q=2 update; apt-get -q=2 install --no-install-recommends {packages} >/dev/null")
    return path


def build(release: str) -> Path:
    """The package."""
    path = system(release, "build", BUILD)
    (path / "src").mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    packed = subprocess.run(
        ["tar", "c", "--null", "-T", "-"], cwd=ROOT, input=tracked, check=True, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "x", "-C", path / "src"], input=packed.stdout, check=True)
    inside(path, "cd /src; make deb docs >/dev/null")
    assert (path / "src/build/site/metrics.html").exists()
    (package,) = (path / "src/dist").glob("*.deb")
    return package


def boot(clean: Path) -> None:
    """Processes of two users join the daemon of systemd's, and each two of one share all."""
    (clean / "booted").write_text(BOOTED)
    (clean / "etc/systemd/system/booted.service").write_text(UNIT)
    inside(clean, "systemctl enable booted.service")
    command: list[str | Path] = ["systemd-nspawn", "-D", clean, "--boot", "--register=no", "--keep-unit"]
    subprocess.run(
        [*command, "--capability=all", "--bind=/dev/userfaultfd"], check=True, stdout=subprocess.DEVNULL, timeout=180
    )
    rows = json.loads((clean / "result").read_text())["processes"]
    merged = sorted(str(row["domain"]) for row in rows if row["merged"] >= 8000)
    assert merged == ["0", "0", "1000", "1000"], rows
    assert (clean / "active").exists()


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for release in sys.argv[1:]:
        package = build(release)
        clean = system(release, "clean", CLEAN)
        shutil.copy(package, clean / "root")
        inside(clean, f"apt-get -q=2 install /root/{package.name} >/dev/null\n{LOOK}")
        boot(clean)
        print(f"{release}: {package.name} ({package.stat().st_size >> 20} MiB) is built, installed, and merges")


if __name__ == "__main__":
    main()
