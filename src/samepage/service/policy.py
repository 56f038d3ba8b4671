"""Which merge domain a process is in: what the administrator wrote, and what holds where nothing was written.

    [default]
    merge = "own"                      # or "zero-only", "off"

    [[rule]]                           # the first whose conditions all hold decides
    unit = "gunicorn@*.service"
    domain = "web"

    [[rule]]
    slice = "batch.slice"
    merge = "off"

    [domain.web]
    across = ["container"]             # closed across user, userns and container, but for what stands here
    users = ["alice", "@staff"]        # who may ask for it by `samepage run --domain web`

Nothing here asks the process: ids and namespaces come from the kernel, cgroups from those who manage them.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from samepage.process.identity import Identity
from samepage.process.merge_domain import SEVERAL, MergeDomain
from samepage.service.cgroups import Group
from samepage.service.patterns import LENGTH_MAX, is_within, matches
from samepage.service.sockets import DOMAIN_NAME

SIZE_MAX = 1 << 20

Name = Annotated[str, msgspec.Meta(pattern=DOMAIN_NAME)]
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=LENGTH_MAX)]


class PolicyError(OSError):
    """The file cannot be used. `strerror` says where and why, in one line."""


class Merge(StrEnum):
    """What is merged of a process that no domain is named for."""

    OWN = "own"
    """All, with processes of its own user, user namespace and container."""
    ZERO_ONLY = "zero-only"
    OFF = "off"


class Across(StrEnum):
    """A boundary that a named domain may be opened across."""

    USER = "user"
    USERNS = "userns"
    CONTAINER = "container"


class Default(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    merge: Merge = Merge.OWN


class Rule(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Conditions are patterns, in which `*` and `?` stand for anything but a slash. That of a cgroup holds for all
    below it."""

    cgroup: Pattern | None = None
    unit: Pattern | None = None
    slice: Pattern | None = None
    container: Pattern | None = None
    label: dict[str, Pattern] = {}
    user: Pattern | None = None
    domain: Name | None = None
    merge: Merge | None = None

    @property
    def looks_at_the_group(self) -> bool:
        """Whether a condition is about the cgroup of a process."""
        return bool(self.cgroup or self.unit or self.slice or self.container or self.label)

    def applies(self, user: int, group: Group, labels: Callable[[], dict[str, str]]) -> bool:
        """Whether all its conditions hold. `labels` are the group's, which are asked for if need be."""
        return (
            (self.cgroup is None or is_within(self.cgroup, group.path))
            and (self.unit is None or matches(self.unit, group.unit))
            and (self.slice is None or any(matches(self.slice, name) for name in group.slices))
            and (self.container is None or matches(self.container, group.container))
            and (not self.label or _has_labels(self.label, labels()))
            and (self.user is None or matches(self.user, _user_name(user)))
        )


class Opened(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A named domain."""

    across: frozenset[Across] = frozenset()
    users: frozenset[str] = frozenset()


class Place(NamedTuple):
    """Where a process belongs, and why."""

    domain: MergeDomain | None
    """None: it is not merged."""
    why: str


class Policy(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file as a whole. `Policy()` is what holds without one."""

    default: Default = Default()
    rule: list[Rule] = []
    domain: dict[Name, Opened] = {}

    def __post_init__(self) -> None:
        for number, rule in enumerate(self.rule, 1):
            if (rule.domain is None) == (rule.merge is None):
                raise ValueError(f"rule {number} has to say either `domain` or `merge`")
            if rule.domain is not None and rule.domain not in self.domain:
                raise ValueError(f"rule {number} names domain {rule.domain!r}, and there is no [domain.{rule.domain}]")
            if not (rule.looks_at_the_group or rule.user):
                raise ValueError(f"rule {number} has no condition: for all other processes there is [default]")

    @property
    def looks_at_groups(self) -> bool:
        """Whether a process's cgroup matters."""
        return any(rule.looks_at_the_group for rule in self.rule)

    def place(self, who: Identity, group: Group, asked: str = "", groups: frozenset[int] = frozenset()) -> Place:
        """Where a process belongs that asked for a domain (or not: ""), and whose user is in `groups`."""
        user, labels = who.uids[0], cache(group.labels)
        for number, rule in enumerate(self.rule, 1):
            if rule.applies(user, group, labels):
                why = f"rule {number}"
                return self._named(rule.domain, who, why) if rule.domain else _merged(rule.merge, who, why)
        if asked and not re.fullmatch(DOMAIN_NAME, asked):
            return Place(None, "it asks for a merge domain whose name is none")
        if not asked or (asked not in self.domain and self.default.merge != Merge.OWN):
            return _merged(self.default.merge, who, "default")
        if asked not in self.domain:  # nobody gets in by that: it is a part of its own domain
            return Place(replace(who.domain, name=asked), "--domain")
        if who.domain != MergeDomain(user):  # inside a container or a user namespace anybody can have any id
            return Place(None, f"only a rule lets a process of a container or user namespace into domain {asked!r}")
        if user == 0 or _is_among(self.domain[asked].users, user, groups):
            return self._named(asked, who, "--domain")
        return Place(None, f"user {_user_name(user)} may not ask for domain {asked!r}")

    def _named(self, name: str, who: Identity, why: str) -> Place:
        across = self.domain[name].across
        own = who.domain
        hides = not who.userns  # it could be in any namespace
        return Place(
            MergeDomain(
                user=SEVERAL if Across.USER in across else own.user,
                userns=0 if Across.USERNS in across and not hides else own.userns,
                container=0 if Across.CONTAINER in across and not hides else own.container,
                name=name,
            ),
            why,
        )


def _merged(merge: Merge | None, who: Identity, why: str) -> Place:
    if merge == Merge.OFF:
        return Place(None, f"{why} says off")
    return Place(replace(who.domain, zero_only=merge == Merge.ZERO_ONLY), why)


def load(path: str) -> Policy:
    """Read a policy. `PolicyError` when it is not there, not right, or somebody else could change it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise PolicyError(errno.EINVAL, f"policy {path} is no regular file")
            if _may_be_changed(found):
                raise PolicyError(errno.EPERM, f"policy {path} could be changed by others: chown and chmod go-w")
            if folder := _where_it_could_be_replaced(path):
                raise PolicyError(errno.EPERM, f"policy {path} could be replaced by others, who may write to {folder}")
            if found.st_size > SIZE_MAX:
                raise PolicyError(errno.EFBIG, f"policy {path} is longer than {SIZE_MAX} bytes")
            text = os.read(fd, SIZE_MAX)
        finally:
            os.close(fd)
    except PolicyError:
        raise
    except OSError as e:
        raise PolicyError(e.errno or errno.EIO, f"cannot read policy {path}: {e.strerror}") from e
    return parse(text, path)


def _may_be_changed(found: os.stat_result) -> bool:
    """By somebody who is neither root nor this user."""
    return found.st_uid not in (0, os.getuid()) or bool(found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode))


def _where_it_could_be_replaced(path: str) -> str:
    """A directory or symbolic link on the way to a file, at which others could put another file, an empty one of root's
    perhaps; "" if there is none. In a directory like /tmp (sticky) nobody moves what is not theirs."""
    for way in (os.path.abspath(path), os.path.realpath(path)):
        for step in (*Path(way).parents, Path(way)):
            found = step.lstat()
            is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and found.st_uid == 0
            if not is_sticky and _may_be_changed(found):
                return str(step)
    return ""


def parse(text: bytes, path: str) -> Policy:
    """`PolicyError` with `path` in its sentence."""
    try:
        return msgspec.toml.decode(text, type=Policy)
    except (ValueError, RecursionError) as e:  # also numbers of thousands of digits, and brackets in brackets
        raise PolicyError(errno.EINVAL, f"policy {path}: {e}") from e


# -- conditions -----------------------------------------------------------------------------------------


def _has_labels(wanted: dict[str, str], labels: dict[str, str]) -> bool:
    return all(matches(pattern, labels.get(key, "")) for key, pattern in wanted.items())


def _user_name(user: int) -> str:
    """Its id where it has none. May ask a server, and ksmd waits meanwhile: only where a policy names users."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _is_among(users: frozenset[str], user: int, groups: frozenset[int]) -> bool:
    """Whether one of `users` is this one: a name, a number, or @ and the name or number of a group."""
    if not users.isdisjoint({_user_name(user), str(user)}):
        return True
    return any(_group_id(one[1:]) in groups for one in users if one.startswith("@"))


def _group_id(name: str) -> int:
    if name.isascii() and name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return -1
