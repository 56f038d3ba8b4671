"""Processes in containers, as docs/containers.md has them join the daemon of their host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from samepage import agent
from tests.service.containers import PROFILES, container, filter_of
from tests.service.test_policy import PAGES, TENANT, ZEROS, Machine, Tenant, machine, shared, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make containers")

ONE_DOMAIN = '[[rule]]\nuser = "root"\ndomain = "tenant"\n[domain.tenant]\nacross = ["container"]'


def contained(host: Machine, profile: Path, **variables: str) -> Tenant:
    """A tenant in a container, under a runtime's filter."""
    if shutil.which("bwrap") is None:
        pytest.skip("needs bwrap")
    if not profile.exists():
        pytest.skip(f"needs {profile}")
    program = filter_of(profile, host.folder / "filter")
    mounts = {"/run/samepage": str(host.folder), "/opt/samepage": str(agent.library_path().parent)}
    environment = {"LD_PRELOAD": f"/opt/samepage/{agent.NAME}", "SAMEPAGE_SOCKET": "/run/samepage/socket"}
    python = os.path.realpath(sys.executable)
    command = container(program, mounts, [python, "-c", TENANT], **environment | variables)
    return host.started(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))


@pytest.mark.parametrize("runtime", PROFILES)
def test_containers_under_the_default_filter_of_a_runtime_share_if_the_filter_is_vouched_for(runtime: str) -> None:
    with machine(ONE_DOMAIN) as host:
        tenants = [contained(host, PROFILES[runtime], SAMEPAGE_SECCOMP="1") for _ in range(3)]
        stranger = contained(host, PROFILES[runtime])  # nobody said that its filter does not kill
        until(lambda: min(map(host.merged, tenants)) >= PAGES)
        assert [shared(tenants[i], tenants[j]) for i, j in ((0, 1), (0, 2), (1, 2))] == [PAGES - ZEROS] * 3
        assert stranger.pid not in host.domains()
        # The three have a third of what they share, and the stranger has all of its own.
        assert max(tenant.pss() for tenant in tenants) < PAGES * 4 / 2
        assert stranger.pss() >= PAGES * 4


def test_three_tenants_share_nothing_whatever_domain_they_ask_for() -> None:
    """Root in each: one asks for a domain of the policy's, one for a user's, two for the same of their own."""
    policy = '[domain.staff]\nacross = ["user", "container"]\nusers = ["root"]'
    with machine(policy) as host:
        honest = host.tenant(SAMEPAGE_DOMAIN="staff")  # on the host, where root may
        tenants = [
            contained(host, PROFILES["Podman"], SAMEPAGE_SECCOMP="1", SAMEPAGE_DOMAIN=asked) for asked in ("staff", "0")
        ] + [contained(host, PROFILES["Podman"], SAMEPAGE_SECCOMP="1", SAMEPAGE_DOMAIN="x") for _ in range(2)]
        until(lambda: host.merged(tenants[2]) >= ZEROS)
        host.passes(5)
        everybody = [honest, *tenants]
        assert [shared(a, b) for a in everybody for b in everybody if a is not b] == [0] * 20
        assert min(tenant.pss() for tenant in tenants) >= (PAGES - ZEROS) * 4
        assert {tenant.pid for tenant in tenants[:2]}.isdisjoint(host.domains())
        assert host.domains()[honest.pid].startswith("staff")


OLD = Path(os.environ.get("SAMEPAGE_OLD_ROOT", "/var/lib/samepage-tests/bullseye"))
"""Debian 11: glibc 2.31, as Ubuntu 20.04 has."""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_image_with_the_glibc_of_2020_is_merged() -> None:
    for tool in ("bwrap", "debootstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    if not (OLD / "usr/bin/python3").exists():
        command = ["debootstrap", "--variant=minbase", "--include=python3", "bullseye", str(OLD)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with machine(ONE_DOMAIN) as host:
        command = ["bwrap", "--bind", str(OLD), "/", "--proc", "/proc", "--dev", "/dev", "--unshare-pid"]
        command += ["--ro-bind", "/sys", "/sys", "--die-with-parent", "--ro-bind", str(host.folder), "/mnt"]
        command += ["--ro-bind", str(agent.library_path()), f"/opt/{agent.NAME}"]
        command += ["--setenv", "LD_PRELOAD", f"/opt/{agent.NAME}", "--setenv", "SAMEPAGE_SOCKET", "/mnt/socket"]
        command += ["/usr/bin/python3", "-c", TENANT]
        a, b = (
            host.started(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(2)
        )
        assert "libc-2.31.so" in Path(f"/proc/{a.pid}/maps").read_text()
        until(lambda: min(host.merged(a), host.merged(b)) >= PAGES)
        assert shared(a, b) == PAGES - ZEROS
