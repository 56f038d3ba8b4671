"""A process that becomes somebody else takes nothing of who it was with it: not its domain, and no privileges."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.preload import Preload, compile_c

HERE = Path(__file__).parent
NOBODY = 65534
CLONE_NEWUSER = 0x10000000
pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("identity")
    return str(compile_c(HERE / "identity.c", directory / "identity", "-pthread"))


WAYS = ["setuid", "seteuid", "setreuid", "setresuid", "setgid", "setegid", "setregid", "setresgid", "setgroups"]
WAYS += ["initgroups", "setfsuid", "setfsgid", "capset", "SYS_capset", "SYS_setuid", "SYS_setresuid", "SYS_setresgid"]
WAYS += ["SYS_setgroups", "PR_CAPBSET_DROP", "unshare"]


@pytest.mark.parametrize("way", WAYS)
def test_the_thread_keeps_nothing_that_the_process_gives_up(preload: Preload, identity: str, way: str) -> None:
    lines = preload.run([identity, way], merged=True).splitlines()
    assert lines == ["agents 1, the same 1", "changed", "agents 1, the same 1"]


def test_a_thread_that_acts_for_somebody_else_changes_nothing(preload: Preload, identity: str) -> None:
    lines = preload.run([identity, "thread"], merged=True).splitlines()
    assert lines == ["agents 1, the same 1", "changed", "agents 1, the same 1"]


def test_a_change_that_passes_no_wrapper_ends_merging(preload: Preload, identity: str) -> None:
    """An inline system call is noticed when pages are to be given away."""
    lines = preload.run([identity, "inline"], merged=True).splitlines()
    assert lines == ["agents 1, the same 1", "changed", "agents 0, the same 0"]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where everybody may join."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        os.chmod(directory, 0o755)
        sock.bind(f"{directory}/socket")
        os.chmod(f"{directory}/socket", 0o777)
        sock.listen()
        sock.settimeout(20)
        yield sock


def joined_as(sock: socket.socket) -> int:
    assert sock.recv(1 << 17)
    user: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return user


@pytest.mark.parametrize("way", ["setuid", "seteuid", "setresuid", "SYS_setuid"])
def test_a_process_leaves_before_it_is_another_user_and_joins_as_that(
    preload: Preload, identity: str, listener: socket.socket, way: str
) -> None:
    environment = os.environ | {"LD_PRELOAD": str(preload.library), "SAMEPAGE_SOCKET": listener.getsockname()}
    with subprocess.Popen([identity, way], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with listener.accept()[0] as first:
            assert joined_as(first) == 0
            assert process.stdout.readline() == "changed\n"
            first.setblocking(False)
            assert first.recv(1 << 17) == b""  # it had left before
        with listener.accept()[0] as second:
            assert joined_as(second) == NOBODY
        process.stdout.read()


def test_whoever_has_no_id_in_the_user_namespace_of_a_process_does_not_serve_it(preload: Preload) -> None:
    """There all such users look like one, and so may the process itself."""

    def become() -> None:
        os.setuid(61001)
        assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0  # without a map: it has no id either

    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        os.chmod(directory, 0o755)
        sock.bind(f"{directory}/socket")
        os.chmod(f"{directory}/socket", 0o777)
        if (child := os.fork()) == 0:
            os.setuid(61002)
            sock.listen()  # as that user, the kernel says
            os._exit(0)
        os.waitpid(child, 0)
        library = shutil.copy(preload.library, directory)  # where that user can read it
        environment = {"LD_PRELOAD": library, "SAMEPAGE_SOCKET": f"{directory}/socket"}
        program = "a = bytearray(32 << 20); input()"
        with subprocess.Popen(
            ["/usr/bin/python3", "-c", program], env=os.environ | environment, stdin=subprocess.PIPE, preexec_fn=become
        ) as process:
            sock.settimeout(20)
            with sock.accept()[0] as taken:
                taken.settimeout(5)
                assert taken.recv(1 << 17) == b""
            process.communicate(b"\n")
            assert process.returncode == 0
