"""What a process's cgroup says of it: systemd's unit and slices, the container, and the container's labels.

If somebody else manages a part of the path, only its outermost name is believed. Whoever is given a cgroup (a user's
systemd, a container's root) can make any names below it:
`/user.slice/user-1000.slice/user@1000.service/app.slice/web.service` is unit user@1000.service.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from samepage.process.halt import cgroups_of

CONTAINER = re.compile(
    r"(?:/[^/]+\.slice)*/(?:docker-|libpod-|crio-|cri-containerd-)([0-9a-f]{64})\.scope(?:/|$)"
    r"|/(?:docker|libpod_parent|kubepods(?:/burstable|/besteffort|/guaranteed)?/pod[^/]+|actions_job|containerd|default)/"
    r"(?:libpod-)?([0-9a-f]{64})(?:/|$)"
    r"|(?:/[^/]+\.slice)*/machine-([A-Za-z0-9_.\\-]+?)(?:\.scope)?(?:/|$)"
    r"|/(?:lxc\.payload\.|lxc/)([A-Za-z0-9_.\\-]+?)(?:\.scope)?(?:/|$)"
)
"""Names that Docker, Podman, CRI-O, containerd, LXC and systemd-nspawn give cgroups, with either cgroup driver: at the
root, or in slices of the system's systemd. Elsewhere others may have given such names, for example a service with a
cgroup of its own (Delegate=)."""

STATE_FILES = (
    ("var/lib/docker/containers/{id}/config.v2.json", ("Config", "Labels")),
    ("var/lib/containers/storage/overlay-containers/{id}/userdata/config.json", ("annotations",)),
    ("run/containers/storage/overlay-containers/{id}/userdata/config.json", ("annotations",)),
    ("run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/config.json", ("annotations",)),
    ("run/containerd/io.containerd.runtime.v2.task/moby/{id}/config.json", ("annotations",)),
    ("run/containerd/io.containerd.runtime.v2.task/default/{id}/config.json", ("annotations",)),
)
"""Where container runtimes keep the labels (OCI annotations) of a container. Only root writes there."""

STATE_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Group:
    """The cgroup of a process. `path` is absolute."""

    path: str
    root: str = "/"
    """Where `STATE_FILES` are."""

    @property
    def slices(self) -> list[str]:
        """The systemd slices above the unit, from the outermost on."""
        names = self.path.strip("/").split("/")
        found: list[str] = []
        for name in names:
            if not name.endswith(".slice"):
                break
            found.append(name)
        return found

    @property
    def unit(self) -> str:
        """The unit of the system's systemd; "" if there is none."""
        rest = self.path.strip("/").split("/")[len(self.slices) :]
        return rest[0] if rest and rest[0].endswith((".service", ".scope", ".mount", ".socket", ".swap")) else ""

    @property
    def container(self) -> str:
        """Id or name of the container; "" if the process is in none that root started. Users choose the names below
        /user.slice."""
        if self.path.startswith("/user.slice/"):
            return ""
        found = CONTAINER.match(self.path)
        return next(filter(None, found.groups()), "") if found else ""

    def labels(self) -> dict[str, str]:
        """The labels of its container; none if there is no container, or if its runtime is unknown."""
        if re.fullmatch(r"[0-9a-f]{64}", self.container):
            for file, keys in STATE_FILES:
                with contextlib.suppress(OSError, ValueError, RecursionError):
                    path = Path(self.root) / file.format(id=self.container)
                    if path.stat().st_size > STATE_MAX:
                        continue
                    found = json.loads(path.read_bytes())
                    for key in keys:
                        found = found[key] if isinstance(found, dict) and key in found else {}
                    if isinstance(found, dict):
                        return {key: value for key, value in found.items() if isinstance(value, str)}
        return {}


NOWHERE = Group("/")


def group_of(pid: int) -> Group:
    """The cgroup of a process: in version 2's hierarchy, or else in the first of version 1's that says something.
    OSError."""
    paths: dict[str, str] = {}
    for _, controllers, path in cgroups_of(pid):
        paths |= dict.fromkeys(controllers.split(","), path)
    for controller in ("", "name=systemd", "memory"):
        if paths.get(controller, "/") != "/":
            return Group(paths[controller])
    return NOWHERE
