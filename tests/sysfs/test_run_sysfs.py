"""`samepage run --sysfs`: the command, and nobody else, finds samepage's files where the kernel's are."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samepage import commands
from samepage.sysfs import mount
from tests.sysfs.conftest import KSM, attempt, environment, needs_fuse

needs_ksm = pytest.mark.skipif(not KSM.exists(), reason="needs a kernel with KSM, to put the tree over its files")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def as_user(folder: Path) -> list[str]:
    """A command line that runs another as a user with no privilege, who may open /dev/fuse as nearly everywhere."""
    # daemon, for fusermount3 wants a name; and not 65534, who is not served in a user namespace.
    user = ["setpriv", "--reuid", "1", "--regid", "1", "--clear-groups", "--"]
    if os.stat("/dev/fuse").st_mode & 0o006 == 0o006:
        return user
    device = folder / "fuse"
    made = subprocess.run(["mknod", "-m", "666", device, "c", "10", "229"], capture_output=True)
    if made.returncode or attempt(os.open, device, os.O_RDWR) == "EACCES":
        pytest.skip("needs a /dev/fuse that users may open")
    script = f'mount --bind {device} /dev/fuse && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", script, "sh", *user]


def python_for(user: list[str]) -> str:
    """A Python that the user can run, with what samepage needs: this one may be in somebody's home."""
    work = "import samepage.commands, numpy, msgspec"
    for python in (sys.executable, "/usr/bin/python3"):
        probe = [*user, "unshare", "--user", python, "-c", work]
        done = subprocess.run(probe, env=environment(), capture_output=True, text=True, cwd="/")
        if done.returncode == 0:
            return python
    pytest.skip(f"needs user namespaces, and a Python that every user can run: {done.stderr.strip()[-100:]}")


@pytest.fixture(params=["root", "user"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """`samepage run --sysfs`, as root and as somebody who is not."""
    before: list[str] = []
    python = sys.executable
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    if request.param == "user" and os.geteuid() == 0:
        if shutil.which("fusermount3") is None:
            pytest.skip("needs fusermount3 (fuse3)")
        before = as_user(tmp_path)
        python = python_for(before)

    def run(*command: str, memory: str = "all", **options: Any) -> subprocess.CompletedProcess[str]:
        line = [*before, python, "-m", "samepage", "run", "--sysfs", "--memory", memory, "--"]
        line += [python if word == sys.executable else word for word in command]
        env = environment(TMPDIR="/tmp", XDG_RUNTIME_DIR="")
        options = {"cwd": "/"} | options
        return subprocess.run(line, env=env, capture_output=True, text=True, timeout=100, **options)

    return run


pytestmark = [needs_fuse, needs_ksm]


def test_the_command_sees_the_tree_and_the_host_does_not(run: Run) -> None:
    before = {name: (KSM / name).read_text() for name in ("sleep_millisecs", "stable_node_chains_prune_millisecs")}
    script = "cd /sys/kernel/mm/ksm; cat advisor_mode; echo 4321 > sleep_millisecs; cat sleep_millisecs; ls"
    done = run("sh", "-c", script)
    assert done.stdout.splitlines() == ["none scan-time [cpu]", "4321", *sorted(os.listdir(KSM))], done.stderr
    assert "cpu" not in (KSM / "advisor_mode").read_text()
    assert (KSM / "sleep_millisecs").read_text() != "4321\n" or before["sleep_millisecs"] == "4321\n"


def test_its_children_see_it_too_and_its_own_proc_files_are_samepages(run: Run) -> None:
    script = 'grep " /proc/$$/ksm_stat " /proc/self/mountinfo | grep -c samepage; sh -c "cat /sys/kernel/mm/ksm/run"'
    done = run("sh", "-c", script)
    assert done.stdout == "1\n1\n", done.stderr


def test_the_command_joins_and_its_files_tell_what_is_merged(run: Run) -> None:
    """Two processes with the same array. Those of a user are only looked at: they may not have what swapping takes."""
    program = """
import os, time
import numpy as np
child = os.fork()
array = np.random.default_rng(1).integers(0, 256, 4 << 20, np.uint8)
if child == 0:
    time.sleep(100)
name = "ksm_rmap_items" if os.geteuid() else "ksm_merging_pages"
def pages(path):
    with open(path) as file:
        return int(dict(line.split() for line in file)[name])
deadline = time.monotonic() + 60
tree = "/sys/kernel/mm/ksm"
pids = (child, os.getpid())
while min(pages(f"{tree}/.proc/{pid}/ksm_stat") for pid in pids) < 1000 and time.monotonic() < deadline:
    time.sleep(0.05)
print([pages(f"/proc/{pid}/ksm_stat") >= 1000 for pid in (*pids, "self")])
with open(f"{tree}/pages_sharing") as file:
    print(int(file.read()) >= 1000)
os.kill(child, 9)
"""
    done = run(sys.executable, "-c", program)
    files, shared = done.stdout.splitlines() or [done.stderr, ""]
    assert files == "[True, True, True]"
    assert shared == "True" or "userfaultfd" in done.stderr


def test_two_full_scans_merge_what_a_child_has_that_was_just_forked(run: Run) -> None:
    """As the kernel's selftests expect it. Of a user's child it is only expected to be known (see above)."""
    program = """
import os, time
import numpy as np
name = "ksm_rmap_items" if os.geteuid() else "ksm_merging_pages"
tree = "/sys/kernel/mm/ksm"
def read(path):
    with open(path) as file:
        return file.read()
def write(name, text):
    with open(f"{tree}/{name}", "w") as file:
        file.write(text)
def pages():
    return int(dict(line.split() for line in read("/proc/self/ksm_stat").splitlines())[name])
array = np.ones(4 << 20, np.uint8)
write("sleep_millisecs", "0")  # passes as fast as they go
deadline = time.monotonic() + 60
while pages() < 1000 and time.monotonic() < deadline:
    time.sleep(0.05)
del array
pid = os.fork()
if pid == 0:
    array = np.ones(4 << 20, np.uint8)
    write("run", "2")
    write("run", "1")
    while int(read(f"{tree}/full_scans")) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    os._exit(pages() < 1000)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = run(sys.executable, "-c", program)
    assert done.stdout == "0\n" or "userfaultfd" in done.stderr, done.stderr


@pytest.mark.parametrize("run", ["root"], indirect=True)
def test_zero_pages_of_a_process_are_counted_as_they_are_when_asked(run: Run) -> None:
    """Unmerged in half, then written in the other half, and asked at once, as the kernel's selftests do."""
    program = """
import ctypes, mmap, time
n = 512
area = mmap.mmap(-1, n << 12, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
area[:] = bytes(n << 12)
area.madvise(mmap.MADV_MERGEABLE)
def zeros():
    with open("/proc/self/ksm_stat") as file:
        return int(dict(line.split() for line in file)["ksm_zero_pages"])
deadline = time.monotonic() + 60
while zeros() < n and time.monotonic() < deadline:
    time.sleep(0.05)
said = [zeros()]
area.madvise(mmap.MADV_UNMERGEABLE, 0, n << 11)
said.append(zeros())
for page in range(n // 2, n):
    area[page << 12] = 1
    if page % 100 == 0:
        said.append(zeros())
said.append(zeros())
print(said)
"""
    done = run(sys.executable, "-c", program, memory="large")  # Python's own zeros count as well
    assert done.stdout == "[512, 256, 211, 111, 11, 0]\n", done.stderr


def test_user_group_directory_streams_and_exit_status_are_as_ever(run: Run) -> None:
    done = run("sh", "-c", "id -u; id -g; pwd; cat; echo err >&2; exit 7", input="in\n", cwd="/usr/share")
    uid, gid, *rest = done.stdout.splitlines()
    assert rest == ["/usr/share", "in"]
    assert uid == gid
    assert uid in ("0", "1")
    said = done.stderr.splitlines()
    if said[0].startswith("samepage: only regions"):  # a user without userfaultfd is told at the start
        del said[0]
    assert (said[0], said[1].partition(" ")[0], len(said)) == ("err", "samepage:", 2)
    assert done.returncode == 7
    assert run("sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    assert run("grep", "CapEff", "/proc/self/status").stdout.split()[1] == effective(uid)


def effective(uid: str) -> str:
    """The capabilities of a command that is run as ever: root's, or none."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return line.split()[1] if uid == "0" else "0" * 16


def test_what_cannot_be_executed_is_126_or_127(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    assert run("/no/such/program").returncode == 127
    done = run("/etc/passwd")
    assert (done.returncode, done.stderr.count("\n")) == (126, 1)


def test_where_no_namespace_is_allowed_one_line_says_so(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to forbid it")
    script = 'echo 0 > /proc/sys/user/max_mnt_namespaces; exec "$@"'
    own = ["unshare", "--user", "--map-root-user", "--mount", "--", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*own, sys.executable, "-m", "samepage", "run", "--sysfs", "--", "touch", str(tmp_path / "started")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "namespace" in done.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("directory", "why"), [("missing", "make the directory first"), ("file", "not a directory"), ("dead", "dead mount")]
)
@pytest.mark.parametrize("command", ["run", "daemon"])
def test_a_bad_place_to_mount_is_one_clear_line_before_anything_starts(
    tmp_path: Path, command: str, directory: str, why: str
) -> None:
    (tmp_path / "file").touch()
    if directory == "dead":
        make_dead_mount(tmp_path / "dead")
    arguments = ["touch", str(tmp_path / "started")] if command == "run" else ["--socket", str(tmp_path / "socket")]
    line = [sys.executable, "-m", "samepage", command, "--mount", str(tmp_path / directory), *arguments]
    try:
        done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    finally:
        if directory == "dead":
            subprocess.run(["umount", tmp_path / "dead"], check=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert why in done.stderr
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "socket").exists()


def make_dead_mount(directory: Path) -> None:
    """Mount by hand, with nobody who unmounts, and kill the server."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    directory.mkdir()
    pidfd = os.pidfd_open(os.getpid())
    command = [str(mount.PROGRAM), "/none", str(pidfd), str(directory), "fsname=dead"]
    with subprocess.Popen(command, pass_fds=(pidfd,), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(b"run 644\n")
        server.stdin.close()
        assert server.stdout.readline() == b"mounted\n"
        server.kill()
    os.close(pidfd)


def test_without_the_program_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mount, "PROGRAM", tmp_path / "missing")
    assert commands.main(["daemon", "--socket", str(tmp_path / "socket"), "--mount", str(tmp_path)]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "libfuse3-dev" in err
