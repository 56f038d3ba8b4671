"""What a program says of its memory holds after it was merged and unmerged, or the memory is left alone."""

from __future__ import annotations

import pytest

from tests.agent.preload import ROOT, Preload, compile_c

KEPT = "plain dontfork dontdump hugepage nohugepage sequential random cold guard stack"
LEFT_ALONE = "wipeonfork growsdown droppable bound"


@pytest.fixture(scope="module")
def flags(preload: Preload, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The flags without the agent; and with it, whether anything was merged and the flags."""
    path = tmp_path_factory.mktemp("attributes") / "attributes"
    program = str(compile_c(ROOT / "tests" / "agent" / "attributes.c", path))
    bare = {line[0]: line[2] for line in map(_fields, preload.run([program], bare=True).splitlines())}
    merged = {line[0]: line[1:] for line in map(_fields, preload.run([program, "merge"], merged=True).splitlines())}
    return bare, merged


def _fields(line: str) -> list[str]:
    return (line + "\t\t").split("\t")


@pytest.mark.parametrize("name", [f"{late}{name}" for name in KEPT.split() for late in ("", "late-")])
def test_memory_is_merged_and_keeps_it(flags: tuple[dict[str, str], dict[str, list[str]]], name: str) -> None:
    bare, merged = flags
    if name not in bare or bare[name] == "cannot be had":
        pytest.skip("this kernel has none, or it cannot be given late")
    assert merged[name][0] == "merged"
    assert merged[name][1] == bare[name]


@pytest.mark.parametrize("name", LEFT_ALONE.split())
def test_memory_is_left_alone(flags: tuple[dict[str, str], dict[str, list[str]]], name: str) -> None:
    bare, merged = flags
    if bare[name] == "cannot be had":
        pytest.skip("this kernel has none")
    assert merged[name][:2] == ["left alone", bare[name]]


@pytest.mark.parametrize("name", ["late-wipeonfork", "late-bound", "late-named"])
def test_memory_that_is_merged_already_is_unmerged_for_it(
    flags: tuple[dict[str, str], dict[str, list[str]]], name: str
) -> None:
    """A name can only be given to anonymous memory. It is lost when the memory is merged again."""
    bare, merged = flags
    assert merged[name][1] == bare[name]
    assert [key for key in merged if key.startswith(name)] == [key for key in bare if key.startswith(name)]
