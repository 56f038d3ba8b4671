"""What files show and take, without a file: the kernel's formats, and its ways to read a number."""

from __future__ import annotations

import errno

import pytest

from samepage.ksmd import Ksmd
from samepage.service import ksm_files
from samepage.service.ksm_files import FILES

KSMD = Ksmd()


@pytest.mark.parametrize("name", FILES)
def test_what_is_read_can_be_written_back(name: str) -> None:
    text = ksm_files.texts(KSMD.counters(), KSMD.get)[name]
    if FILES[name].parse is None:
        with pytest.raises(OSError, match="can be written") as raised:
            ksm_files.value(name, text)
        assert raised.value.errno == errno.EIO
    else:
        written = text.partition("[")[2].partition("]")[0] if "[" in text else text
        assert ksm_files.value(name, written) == KSMD.get(name)


@pytest.mark.parametrize(
    ("mode", "shown"),
    [("none", "[none] scan-time\n"), ("scan-time", "none [scan-time]\n"), ("cpu", "none scan-time [cpu]\n")],
)
def test_an_advisor_the_kernel_does_not_have_is_shown_only_while_it_is_in_force(mode: str, shown: str) -> None:
    assert FILES["advisor_mode"].show(mode) == shown


@pytest.mark.parametrize("text", ["7", "7\n", "+7", "007\n", "7\0junk", "7\n\0junk"])
def test_numbers_are_what_kstrtouint_takes(text: str) -> None:
    assert ksm_files.value("sleep_millisecs", text) == "7"


@pytest.mark.parametrize(
    "text", ["", "\n", " 7", "7 ", "7\n\n", "-7", "0x7", "7.0", "++7", "seven", "٧", "\0", "4294967296"]
)
def test_everything_else_is_einval(text: str) -> None:
    with pytest.raises(OSError, match=r"not a number|out of range") as raised:
        ksm_files.value("sleep_millisecs", text)
    assert raised.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("merge_across_nodes", "18446744073709551616", errno.ERANGE),
        ("merge_across_nodes", "18446744073709551616x", errno.ERANGE),
        ("merge_across_nodes", "1x", errno.EINVAL),
        ("max_page_sharing", "2147483648", errno.ERANGE),
        ("max_page_sharing", "-2147483649", errno.ERANGE),
        ("max_page_sharing", "-+1", errno.EINVAL),
        ("advisor_max_cpu", "18446744073709551616", errno.EINVAL),
        ("nonsense", "1", errno.ENOENT),
    ],
)
def test_two_files_tell_a_number_that_is_too_large_from_none(name: str, text: str, code: int) -> None:
    with pytest.raises(OSError, match=r"number|range|no file") as raised:
        ksm_files.value(name, text)
    assert raised.value.errno == code


@pytest.mark.parametrize("name", ["smart_scan", "use_zero_pages"])
@pytest.mark.parametrize("value", ["0", "1"])
def test_switches_know_words(name: str, value: str) -> None:
    words = {"0": ["0", "n", "No\n", "off", "false", "disable"], "1": ["1", "Y", "yes\n", "ON", "true", "enable"]}
    assert {ksm_files.value(name, word) for word in words[value]} == {value}
    with pytest.raises(OSError, match="neither"):
        ksm_files.value(name, "o")


def test_a_process_that_has_not_joined_has_merged_nothing() -> None:
    assert ksm_files.process_texts(None) == {
        "ksm_stat": "ksm_rmap_items 0\nksm_zero_pages 0\nksm_merging_pages 0\nksm_process_profit 0\n"
        "ksm_merge_any: no\nksm_mergeable: no\n",
        "ksm_merging_pages": "0\n",
    }
