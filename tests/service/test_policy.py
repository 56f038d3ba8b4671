"""Who may share with whom: what a policy says, and processes that try to get where they do not belong."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from samepage import agent
from samepage.process.identity import OWN_USERNS, Identity
from samepage.process.merge_domain import SEVERAL, MergeDomain
from samepage.service.cgroups import Group, group_of
from samepage.service.control import Client
from samepage.service.policy import PolicyError, parse

ID = "0123456789abcdef" * 4
NOBODY = 65534

# -- what the file says ---------------------------------------------------------------------------------


def who(uid: int = 1000, userns: int = OWN_USERNS, container: int = 0, pid: int = 7) -> Identity:
    return Identity((uid,) * 4, (uid,) * 4, 1, 2, userns, pid, container)


def place(text: str, path: str = "/", someone: Identity | None = None, **asked: Any) -> MergeDomain | None:
    return parse(text.encode(), "p").place(someone or who(), Group(path), **asked).domain


def test_without_a_policy_user_user_namespace_and_container_are_boundaries() -> None:
    found = {place("", someone=someone) for someone in (who(), who(1001), who(userns=5), who(container=6))}
    assert found == {MergeDomain(1000), MergeDomain(1001), MergeDomain(1000, 5), MergeDomain(1000, 0, 6)}
    assert len({str(domain) for domain in found}) == 4


@pytest.mark.parametrize(
    ("condition", "inside", "outside"),
    [
        ('unit = "web@*.service"', "/system.slice/system-web.slice/web@1.service", "/system.slice/webby.service"),
        ('unit = "web.service"', "/web.service", "/user.slice/user-1000.slice/user@1000.service/web.service"),
        ('unit = "web.service"', "/system.slice/web.service/sub", "/system.slice/other.service/web.service"),
        ('slice = "web.slice"', "/web.slice/web-a.slice/x.service", "/user.slice/user@1.service/web.slice/x.service"),
        ('cgroup = "/a/*/c"', "/a/b/c/d", "/a/b/b/c"),
        ('cgroup = "/a/**"', "/a/b/b", "/aa/b"),
        ('cgroup = "/a"', "/a/b", "/ab"),
        ('cgroup = "/a.c"', "/a.c", "/abc"),
        ('container = "0123*"', f"/system.slice/docker-{ID}.scope", f"/system.slice/docker-{ID[::-1]}.scope"),
        ('container = "*"', f"/docker/{ID}/sub", f"/user.slice/user-7.slice/user@7.service/docker-{ID}.scope"),
        ('container = "*"', f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope", "/system.slice/a.scope"),
        ('container = "db"', "/lxc.payload.db/system.slice/x.service", "/lxc.payload.db2"),
        ('container = "db"', "/machine.slice/machine-db.scope/payload", "/system.slice/db.service"),
    ],
)
def test_a_rule_holds_for_processes_in_these_cgroups(condition: str, inside: str, outside: str) -> None:
    text = f'[[rule]]\n{condition}\nmerge = "off"'
    assert place(text, inside) is None
    assert place(text, outside) == MergeDomain(1000)


def test_the_outermost_container_counts_for_what_is_inside_makes_its_own_names() -> None:
    assert Group(f"/docker/{ID}/docker/{ID[::-1]}").container == ID


def test_the_labels_of_a_container_are_read_once_however_many_rules_ask_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []

    def stat(path: Path) -> os.stat_result:
        reads.append(path)
        return os.stat(path)

    monkeypatch.setattr(Path, "stat", stat)
    rules = "".join(f'[[rule]]\nlabel = {{a = "{n}"}}\nmerge = "off"\n' for n in range(50))
    parse(rules.encode(), "p").place(who(), Group(f"/docker/{ID}", str(tmp_path)))
    assert len(reads) == len(set(reads)) > 0


def test_the_first_rule_whose_conditions_all_hold_decides() -> None:
    text = """
        [[rule]]
        user = "root"
        slice = "a.slice"
        merge = "off"
        [[rule]]
        slice = "a.slice"
        merge = "zero-only"
        [[rule]]
        slice = "*"
        domain = "all"
        [domain.all]
    """
    assert place(text, "/a.slice/x.service", who(0)) is None
    assert place(text, "/a.slice/x.service") == MergeDomain(1000, zero_only=True)
    assert place(text, "/b.slice/x.service") == MergeDomain(1000, name="all")
    assert place(text, "/b") == MergeDomain(1000)


def test_a_named_domain_is_open_only_across_what_it_says() -> None:
    text = '[[rule]]\nuser = "*"\ndomain = "web"\n[domain.web]\nacross = %s'
    a, b = who(1000, 5, 6), who(1001, 7, 8)
    assert place(text % "[]", someone=a) == MergeDomain(1000, 5, 6, "web")
    assert place(text % '["user"]', someone=a) == MergeDomain(SEVERAL, 5, 6, "web")
    assert place(text % '["userns", "container"]', someone=a) == MergeDomain(1000, name="web")
    everything = text % '["user", "userns", "container"]'
    assert place(everything, someone=a) == place(everything, someone=b) == MergeDomain(SEVERAL, name="web")


def test_a_process_that_hides_its_namespaces_is_in_no_domain_with_others() -> None:
    text = '[[rule]]\nuser = "*"\ndomain = "web"\n[domain.web]\nacross = ["user", "userns", "container"]'
    hidden = {place(text, someone=who(userns=0, pid=pid)) for pid in (1, 2)}
    assert len(hidden | {place(text)}) == 3


def test_whoever_asks_for_a_domain_gets_in_only_if_the_policy_says_so() -> None:
    text = '[domain.web]\nacross = ["user"]\nusers = ["1001", "@77"]\n'
    assert place(text, asked="web") is None
    assert place(text, someone=who(1001), asked="web") == MergeDomain(SEVERAL, name="web")
    assert place(text, asked="web", groups=frozenset({77})) == MergeDomain(SEVERAL, name="web")
    for elsewhere in (who(1001, userns=5), who(1001, container=6), who(0, container=6), who(1001, userns=0)):
        assert place(text, someone=elsewhere, asked="web") is None
    assert place(text, someone=who(0), asked="web") == MergeDomain(SEVERAL, name="web")
    assert place(text, asked="mine") == MergeDomain(1000, name="mine")  # apart from all others, but its own
    assert place(text, asked="a b") is None
    assert place(text, asked="1001") is None
    ruled = text + '[[rule]]\nuser = "*"\nmerge = "off"'
    assert place(ruled, someone=who(1001), asked="web") is None
    assert place('[default]\nmerge = "off"', asked="mine") is None
    assert place('[default]\nmerge = "zero-only"', asked="mine") == MergeDomain(1000, zero_only=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[rule]]\nmerge = 'off'", "rule 1 has no condition"),
        ("[[rule]]\nunit = 'a'", "rule 1 has to say either `domain` or `merge`"),
        ("[[rule]]\nunit = 'a'\nmerge = 'off'\ndomain = 'b'", "rule 1 has to say either"),
        ("[[rule]]\nunit = 'a'\ndomain = 'b'", "no \\[domain.b\\]"),
        ("[[rule]]\nunit = 'a'\nmerge = 'of'", "Invalid enum value 'of'"),
        ("[[rule]]\nunits = 'a'\nmerge = 'off'", "unknown field `units`"),
        ("[[rule]]\nunit = ''\nmerge = 'off'", "length >= 1"),
        ("[domain.web]\nacross = ['users']", "Invalid enum value 'users'"),
        ("[domain.'a b']", "matching regex"),
        ("[domain.1000]", "matching regex"),
        ("[default]\nmerge = 1", "Expected `str`"),
        ("[default", "p:"),
        ("\udcff", "p:"),
        ("a = " + "[" * 100_000, "p: maximum recursion"),
        ("a = " + "1" * 5000, "p: Exceeds"),
        ("[[rule]]\nunit = '" + "*" * 5000 + "'\nmerge = 'off'", "length <= 4096"),
    ],
)
def test_a_wrong_policy_is_refused_with_one_line_that_says_where(text: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why) as wrong:
        parse(text.encode(errors="surrogateescape"), "p")
    assert "\n" not in str(wrong.value.strerror)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("var/lib/docker/containers/{}/config.v2.json", {"Config": {"Labels": {"tier": "web"}}}),
        ("run/containers/storage/overlay-containers/{}/userdata/config.json", {"annotations": {"tier": "web"}}),
        ("run/containerd/io.containerd.runtime.v2.task/k8s.io/{}/config.json", {"annotations": {"tier": "web"}}),
    ],
)
def test_labels_are_those_that_the_container_runtime_keeps(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    state = tmp_path / file.format(ID)
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps(content))
    group = Group(f"/system.slice/docker-{ID}.scope", str(tmp_path))
    policy = parse(b'[[rule]]\nlabel = {tier = "w*"}\nmerge = "off"', "p")
    assert policy.place(who(), group).domain is None
    for wrong in ("[]", "{", "[" * 100_000, '{"Config": 1, "annotations": [1]}', '{"annotations": {"tier": 7}}'):
        state.write_text(wrong)
        assert policy.place(who(), group).domain == MergeDomain(1000)
    assert policy.place(who(), Group("/system.slice/x.service", str(tmp_path))).domain == MergeDomain(1000)


# -- real processes -------------------------------------------------------------------------------------

PAGES, ZEROS = 1024, 256
"""Of each tenant: all equal to its neighbour's, the last of them zeros."""

TENANT = f"""
import ctypes, os, sys, hashlib
data = b"".join(hashlib.sha256(b"%d" % n).digest() * 128 for n in range({PAGES - ZEROS}))
a = bytearray({PAGES} << 12)
a[:len(data)] = data
digest = hashlib.sha256(a).digest()
del data
print(ctypes.addressof(ctypes.c_char.from_buffer(a)), flush=True)
sys.stdin.read()
assert hashlib.sha256(a).digest() == digest
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: other users, namespaces, page frame numbers")


class Tenant:
    """A real process with the agent, that has joined or not."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen
        assert popen.stdout is not None
        self.address = int(popen.stdout.readline())
        self.pid = next(pid for pid in _descendants(popen.pid) if _is_python(pid))

    def frames(self) -> list[int]:
        """Its page frames, 0 where nothing is."""
        with open(f"/proc/{self.pid}/pagemap", "rb") as file:
            file.seek(self.address // 4096 * 8)
            entries = struct.unpack(f"{PAGES}Q", file.read(PAGES * 8))
        return [entry & ((1 << 55) - 1) if entry >> 63 else 0 for entry in entries]

    def pss(self) -> int:
        """In KiB, of its pages alone."""
        found, here = 0, False
        with open(f"/proc/{self.pid}/smaps") as file:
            for line in file:
                if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                    here = int(mapping[1], 16) < self.address + (PAGES << 12) and int(mapping[2], 16) > self.address
                elif here and line.startswith("Pss:"):
                    found += int(line.split()[1])
        return found


def _descendants(pid: int) -> Iterator[int]:
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from _descendants(int(child))


def _is_python(pid: int) -> bool:
    return b"hashlib" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0", 2)[-1] and not _has_child(pid)


def _has_child(pid: int) -> bool:
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text())


class Machine:
    """A daemon with a policy, and the tenants that it serves."""

    def __init__(self, folder: Path, policy: str, ending: ExitStack) -> None:
        self.folder = folder
        self.path = str(folder / "socket")
        self.policy = folder / "policy.toml"
        self.policy.write_text(policy)
        self.policy.chmod(0o644)
        self._ending = ending
        self.errors = folder / "errors"
        command = [sys.executable, "-m", "samepage", "daemon", "--socket", self.path, "--policy", str(self.policy)]
        with self.errors.open("w") as errors:
            self.daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        ending.callback(self._end, self.daemon)
        until(lambda: Path(self.path).exists())
        with Client(self.path) as client:
            client.ask("set", knob="sleep_millisecs", value="20")

    @staticmethod
    def _end(popen: subprocess.Popen[Any]) -> None:
        popen.terminate()
        if popen.stdin is not None:
            popen.stdin.close()
        try:
            popen.wait(10)
        finally:
            popen.kill()

    def tenant(self, *prefix: str, **variables: str) -> Tenant:
        """Starts a process by `prefix`, e.g. `unshare --pid --fork`."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SAMEPAGE_")}
        environment |= {"LD_PRELOAD": str(agent.library_path()), "SAMEPAGE_SOCKET": self.path} | variables
        popen = subprocess.Popen(
            [*prefix, os.path.realpath(sys.executable), "-c", TENANT],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self.started(popen)

    def started(self, popen: subprocess.Popen[str]) -> Tenant:
        """A tenant that somebody else started, who is ended with the machine."""
        self._ending.callback(self._end, popen)
        return Tenant(popen)

    def domains(self) -> dict[int, str]:
        with Client(self.path) as client:
            return {row["pid"]: row["domain"] for row in client.ask("status").get("processes", [])}

    def merged(self, tenant: Tenant) -> int:
        with Client(self.path) as client:
            rows = client.ask("status").get("processes", [])
        return sum(row["merged"] for row in rows if row["pid"] == tenant.pid)

    def passes(self, more: int) -> None:
        """Wait for so many."""
        with Client(self.path) as client:
            scans = client.ask("stats")["counters"]["full_scans"]
            until(lambda: client.ask("stats")["counters"]["full_scans"] >= scans + more)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


@contextmanager
def machine(policy: str = "") -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="samepage-", dir="/tmp") as name, ExitStack() as ending:
        os.chmod(name, 0o755)
        yield Machine(Path(name), policy, ending)


def shared(a: Tenant, b: Tenant) -> int:
    """How many page frames with content both have."""
    return len(set(a.frames()[: PAGES - ZEROS]) & set(b.frames()[: PAGES - ZEROS]) - {0})


CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@needs_root
def test_root_in_one_container_shares_nothing_with_root_in_another() -> None:
    with machine() as host:
        tenants = [host.tenant(*CONTAINER) for _ in range(3)]
        twin = host.tenant("nsenter", f"--target={tenants[0].pid}", "--pid", "--mount")
        until(lambda: min(host.merged(tenants[0]), host.merged(twin)) >= PAGES)
        host.passes(3)
        assert shared(tenants[0], twin) == PAGES - ZEROS
        assert [shared(tenants[i], tenants[j]) for i, j in ((0, 1), (0, 2), (1, 2))] == [0, 0, 0]
        assert len(set(host.domains().values())) == 3


@needs_root
def test_containers_of_one_named_domain_share() -> None:
    policy = '[[rule]]\nuser = "root"\ndomain = "tenant"\n[domain.tenant]\nacross = ["container"]'
    with machine(policy) as host:
        a, b = host.tenant(*CONTAINER), host.tenant(*CONTAINER)
        until(lambda: min(host.merged(a), host.merged(b)) >= PAGES)
        assert shared(a, b) == PAGES - ZEROS
        assert set(host.domains().values()) == {"tenant,user=0"}


@needs_root
def test_zero_only_shares_nothing_but_the_zero_page_and_off_not_even_that() -> None:
    policy = '[[rule]]\nuser = "nobody"\nmerge = "off"\n[default]\nmerge = "zero-only"'
    as_nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    with machine(policy) as host:
        a, b, off = host.tenant(), host.tenant(), host.tenant(*as_nobody)
        until(lambda: min(host.merged(a), host.merged(b)) >= ZEROS)
        host.passes(5)
        assert shared(a, b) == shared(a, off) == 0
        assert min(a.pss(), b.pss()) >= (PAGES - ZEROS) * 4
        assert off.pss() >= PAGES * 4
        zeros = set(a.frames()[PAGES - ZEROS :])
        assert len(zeros) == 1
        assert zeros == set(b.frames()[PAGES - ZEROS :])
        assert zeros.isdisjoint(off.frames())
        assert off.pid not in host.domains()
        assert "is left alone: rule 1 says off" in host.errors.read_text()


@needs_root
def test_a_process_that_asks_for_a_domain_is_apart_from_those_that_did_not() -> None:
    with machine('[domain.staff]\nusers = ["root"]') as host:
        a, b, other = host.tenant(SAMEPAGE_DOMAIN="mine"), host.tenant(SAMEPAGE_DOMAIN="mine"), host.tenant()
        staff = host.tenant(SAMEPAGE_DOMAIN="staff")
        long = host.tenant(SAMEPAGE_DOMAIN="x" * 32)
        until(lambda: min(host.merged(a), host.merged(b)) >= PAGES)
        until(lambda: {other.pid, staff.pid} <= set(host.domains()))
        host.passes(3)
        domains = host.domains()
        assert [domains[t.pid] for t in (a, b, other, staff)] == ["mine,user=0", "mine,user=0", "0", "staff,user=0"]
        assert shared(a, other) == shared(a, staff) == 0
        assert long.pid not in domains


@contextmanager
def a_slice() -> Iterator[Path]:
    """A cgroup of its own, where `group_of` tells it; removed when all have left it."""
    folders = ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup")
    writable = (Path(f) for f in folders if os.path.exists(f"{f}/cgroup.procs") and os.access(f, os.W_OK))
    hierarchy = next(writable, None)
    if hierarchy is None:
        pytest.skip("needs a hierarchy of cgroups that can be written to")
    group = hierarchy / f"samepage-test-{os.getpid()}.slice"
    group.mkdir()
    try:
        yield group
    finally:
        until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


@needs_root
def test_a_process_that_is_moved_to_another_cgroup_is_in_the_domain_of_that() -> None:
    with a_slice() as group, machine(f'[[rule]]\nslice = "{group.name}"\ndomain = "moved"\n[domain.moved]') as host:
        a, b, moved = host.tenant(), host.tenant(), host.tenant()
        until(lambda: min(map(host.merged, (a, b, moved))) >= PAGES)
        assert shared(a, moved) == PAGES - ZEROS
        (group / "cgroup.procs").write_text(str(moved.pid))
        assert group_of(moved.pid).slices[-1:] == [group.name]
        until(lambda: host.domains().get(moved.pid) == "moved,user=0")
        assert host.domains()[a.pid] == host.domains()[b.pid] == "0"
        assert (shared(a, moved), shared(a, b)) == (0, PAGES - ZEROS)
        assert "it belongs in merge domain moved,user=0 now (rule 1)" in host.errors.read_text()
        rows = _checked("--pid", str(moved.pid), str(host.policy))
        assert [(row["domain"], row["why"]) for row in rows] == [("moved,user=0", "rule 1")]


@needs_root
def test_sighup_reads_the_policy_again_and_a_wrong_one_changes_nothing() -> None:
    with machine() as host:
        a, b = host.tenant(), host.tenant()
        until(lambda: set(host.domains().values()) == {"0"} and len(host.domains()) == 2)
        host.policy.write_text("[[rule]]")
        host.daemon.send_signal(signal.SIGHUP)
        until(lambda: "the policy stays as it was" in host.errors.read_text())
        assert set(host.domains()) == {a.pid, b.pid}
        host.policy.write_text('[[rule]]\nuser = "root"\ndomain = "new"\n[domain.new]')
        host.daemon.send_signal(signal.SIGHUP)
        until(lambda: host.domains() == {a.pid: "new,user=0", b.pid: "new,user=0"})
        until(lambda: min(map(host.merged, (a, b))) >= PAGES - ZEROS)
        assert shared(a, b) == PAGES - ZEROS
        host.policy.write_text('[default]\nmerge = "off"')
        host.daemon.send_signal(signal.SIGHUP)
        until(lambda: not host.domains())
        assert host.daemon.poll() is None
        assert shared(a, b) == 0  # what may not be merged is merged no more


# -- the command ----------------------------------------------------------------------------------------


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "samepage", *arguments], capture_output=True, text=True, timeout=60)


def _checked(*arguments: str) -> list[dict[str, Any]]:
    done = _command("policy", "check", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["processes"]
    return rows


def test_check_says_where_each_process_that_runs_belongs(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[default]\nmerge = "zero-only"\n')
    (row,) = _checked("--pid", str(os.getpid()), str(file))
    assert row["domain"] == f"{os.getuid()},zero-only"
    assert row["why"] == "default"
    shown = _command("policy", "check", str(file))
    assert re.search(rf"{os.getuid()},zero-only +default +\d+ ", shown.stdout)


def test_check_of_a_wrong_policy_fails_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("[[rule]]\nunit = 'x'\n")
    for command in (
        ("policy", "check", str(file)),
        ("daemon", "--socket", str(tmp_path / "s"), "--policy", str(file)),
    ):
        done = _command(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert "rule 1 has to say either `domain` or `merge`" in done.stderr


def test_run_refuses_a_domain_that_is_no_name() -> None:
    done = _command("run", "--domain", "a b", "--", "true")
    assert done.returncode == 2
    assert "'a b' is not a name" in done.stderr
