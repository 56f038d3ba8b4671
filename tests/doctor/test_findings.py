"""What a machine is said to give, and the one line that `run` and `daemon` say where nothing is merged by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from samepage.doctor.facts import Facts
from samepage.doctor.findings import examine, hindrance, not_swapped, too_old, way_to_swap

NEW = Facts(
    kernel="6.18.0",
    userfaultfd="device",
    move=True,
    write_protect=True,
    write_protect_files=True,
    pagemap_scan=True,
    mbind=True,
    memfd=True,
    seccomp=0,
    fatal_call=0,
    confined="",
    cgroup=2,
    memory_limit=-1,
    max_map_count=65530,
    fuse=True,
    ksm=0,
    thp="always",
    thp_shmem="within_size",
)
BOOKWORM = replace(NEW, kernel="6.1.0-56-amd64", move=False, pagemap_scan=False)
BULLSEYE = replace(BOOKWORM, kernel="5.10.0-30-amd64", write_protect_files=False)


def of_a_user(facts: Facts) -> Facts:
    return replace(facts, userfaultfd="user mode")


@pytest.mark.parametrize(
    ("facts", "chosen", "way"),
    [
        (NEW, "move", "move"),
        (NEW, "wp", "wp"),
        (of_a_user(NEW), "move", "quiet"),
        (of_a_user(NEW), "wp", "none"),
        (BOOKWORM, "move", "quiet_wp"),
        (BOOKWORM, "wp", "wp"),
        (BULLSEYE, "wp", "wp"),
        (replace(BOOKWORM, mbind=False), "wp", "quiet_wp"),
        (of_a_user(BOOKWORM), "wp", "none"),
        (replace(NEW, userfaultfd="none", move=False, write_protect=False), "move", "none"),
    ],
)
def test_a_way_that_cannot_notice_who_holds_a_page_is_never_taken_by_itself(
    facts: Facts, chosen: str, way: str
) -> None:
    assert way_to_swap(facts, chosen) == way
    assert bool(hindrance(facts, chosen)) == (way not in ("move", "wp"))


def test_the_line_says_what_is_missing_and_what_to_do() -> None:
    line = hindrance(BOOKWORM, "move")
    assert "6.1.0-56-amd64" in line
    for remedy in ("newer kernel", "KSM", "--swap wp"):
        assert remedy in line
    assert "samepage daemon" in hindrance(replace(NEW, userfaultfd="user mode"), "move")
    assert "mbind" in hindrance(replace(BOOKWORM, mbind=False), "wp")


@pytest.mark.parametrize(("release", "old"), [("5.4.0-rc1", True), ("5.10.0", False), ("6.1", False), ("10.0+", False)])
def test_a_kernel_that_is_too_old_is_refused(release: str, old: bool) -> None:
    assert bool(too_old(replace(NEW, kernel=release))) == old


def test_where_all_is_well_nothing_is_to_be_changed() -> None:
    assert [f for f in examine(NEW) if f.state != "ok" or f.change] == []
    assert hindrance(NEW, "move") == ""


def test_what_is_less_than_it_could_be_says_what_that_means() -> None:
    worse = replace(
        BULLSEYE, mbind=False, memfd=False, fuse=False, max_map_count=1000, cgroup=0, seccomp=2, fatal_call=323, ksm=1
    )
    findings = examine(worse)
    assert all(f.means for f in findings if f.state != "ok")
    assert {"swap", "PAGEMAP_SCAN", "mbind", "memfd", "FUSE", "vm.max_map_count", "seccomp"} == {
        f.name for f in findings if f.state != "ok"
    }


def test_of_processes_that_cannot_swap_it_is_said_why() -> None:
    assert not_swapped([]) == not_swapped(["quiet", "move"]) == not_swapped(["wp"]) == ""
    assert "--swap wp" in not_swapped(["quiet_wp"])
    assert "userfaultfd" in not_swapped(["quiet"])
    assert "page tables" in not_swapped(["none"])


def test_a_profile_of_apparmors_is_named() -> None:
    (found,) = [f for f in examine(replace(NEW, confined="worker (enforce)")) if f.name == "confined"]
    assert found.value == "by worker (enforce)"
    assert found.means
