"""Packages of any release of Debian's, fetched by apt as this machine has it set up, and unpacked, not installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

SUITES = (
    ("bullseye", "bullseye-security"),
    ("bookworm", "bookworm-security", "bookworm-backports"),
    ("trixie", "trixie-backports"),
    ("sid",),
)

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

IMAGE = re.compile(r"^linux-image-(\d+)\.(\d+)\.\d[\w.+]*(?:-[\d.]+(?:deb\d+[\d.]*)?)?-amd64$")
"""Not those for clouds, for real time, or unsigned."""


class Archive:
    """What `folder` keeps of it: the lists, and what was fetched. The machine's own apt stays as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._configuration = folder / "apt" / "apt.conf"
        self._names: list[str] = []

    def kernels(self, wanted: str) -> list[str]:
        """Packages with kernels of version `wanted` ("6.1"), or of any (""), oldest first."""
        if not self._names:
            self._names = self._apt("apt-cache", "pkgnames", "linux-image-").split()
        found = []
        for name in self._names:
            if (match := IMAGE.match(name)) and wanted in ("", f"{match[1]}.{match[2]}"):
                numbers = [int(n) for n in re.findall(r"\d+", name)]
                found.append((numbers, name))
        return [name for _, name in sorted(found)]

    def newest(self, wanted: str) -> str:
        """The newest of them; "" when there is none."""
        return next(iter(reversed(self.kernels(wanted))), "")

    def unpack(self, package: str, folder: Path, suite: str = "") -> None:
        """Fetch a package by its name, or take a file, and unpack it into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        file = Path(package)
        if not file.exists():
            name = f"{package}/{suite}" if suite else package
            self._apt("apt-get", "--quiet", "download", name, cwd=folder)
            file = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "--extract", str(file), str(folder)], check=True)
        if file.parent == folder:
            file.unlink()

    def _apt(self, *command: str, cwd: Path | None = None) -> str:
        if not self._configuration.exists():
            self._set_up()
        env = os.environ | {"APT_CONFIG": str(self._configuration), "LC_ALL": "C"}
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def _set_up(self) -> None:
        here = self._configuration.parent
        shutil.rmtree(here, ignore_errors=True)
        (here / "lists" / "partial").mkdir(parents=True)
        lines = [
            f"deb [signed-by={KEYRING}] {place} {suite} main"
            for release in SUITES
            for suite in release
            for place in [_mirror(suite.endswith("-security"))]
            if place
        ]
        (here / "sources.list").write_text("\n".join(lines) + "\n")
        self._configuration.write_text(
            f'Dir::Etc::sourcelist "{here}/sources.list"; Dir::Etc::sourceparts "-";\n'
            f'Dir::State::lists "{here}/lists";\n'
            f'Dir::Cache::pkgcache "{here}/packages"; Dir::Cache::srcpkgcache "{here}/sources";\n'
            'APT::Sandbox::User "root"; Acquire::Languages "none";\n'
        )
        # A release that is not there any more is no reason to do without the others.
        env = os.environ | {"APT_CONFIG": str(self._configuration)}
        subprocess.run(["apt-get", "--quiet", "update"], env=env, capture_output=True)


def _mirror(security: bool) -> str:
    """Where this machine has its own release from."""
    form = "$(REPO_URI) $(CODENAME) $(COMPONENT)"
    said = subprocess.run(["apt-get", "indextargets", "--format", form], capture_output=True, text=True).stdout
    for line in said.splitlines():
        place, suite, component = line.split()
        if "debian" in place and component == "main" and suite.endswith("-security") == security:
            return place
    return ""
