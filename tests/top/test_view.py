"""The lines of `samepage top`."""

from __future__ import annotations

from typing import Any

import pytest

from samepage.top.view import ASCII, BLOCKS, View, question, spark


def row(pid: int, merged: int = 0, **more: Any) -> dict[str, Any]:
    base = {"pid": pid, "comm": f"p{pid}", "domain": "1000", "merged": merged, "ksm_rmap_items": 2 * merged}
    return base | {"cpu_seconds": 0.0, "state": "running", "swap": "move"} | more


COUNTERS = {
    "run": 1,
    "bytes_saved": 5 << 20,
    "cpu_seconds": 1.0,
    "pages_scanned": 100,
    "pages_sharing": 10,
    "ksm_zero_pages": 0,
    "full_scans": 7,
}


def seen(rows: list[dict[str, Any]], **more: Any) -> View:
    view = View()
    view.take(COUNTERS | more, rows, 10.0)
    return view


def pids(view: View) -> list[int]:
    return [row["pid"] for row in view.table()[1]]


def test_processes_stand_in_the_order_of_what_they_have_merged_until_told_otherwise() -> None:
    view = seen([row(1, 10), row(2, 30), row(3, 20)])
    assert pids(view) == [2, 3, 1]
    view.choose("MERGED")
    assert pids(view) == [1, 3, 2]
    view.choose("PID")
    assert pids(view) == [3, 2, 1]
    view.choose("NAME")
    assert pids(view) == [1, 2, 3]


def test_cpu_time_is_that_of_now() -> None:
    view = seen([row(1, cpu_seconds=50.0)])
    view.take(COUNTERS | {"cpu_seconds": 1.5}, [row(1, cpu_seconds=50.25)], 11.0)
    assert view.rows[0]["cpu"] == 25.0
    assert list(view.cpu) == [50.0]


def test_it_is_said_what_ksmd_does() -> None:
    view = seen([row(1)])
    view.take(COUNTERS | {"pages_scanned": 300, "pages_sharing": 60}, [row(1)], 12.0)
    assert "merging 25 pages/s, looking at 100 pages/s, pass 7" in view.head(200)[0]
    view.take(view.counters, [row(1)], 13.0)
    assert "nothing to do" in view.head(200)[0]
    view.take(COUNTERS | {"run": 0}, [row(1)], 14.0)
    assert "ksmd: stopped" in view.head(200)[0]


@pytest.mark.parametrize("width", [20, 40, 80, 132, 200])
def test_no_line_is_wider_than_the_terminal_whatever_a_process_is_called(width: int) -> None:
    rows = [row(4194304, 1 << 28, comm="x\n\x1b[31m" * 20, domain="4294967294,userns=4026532999", state="stopped")]
    view = seen(rows, bytes_saved=1 << 50)
    title, lines = view.lines(width, 10)
    texts = [title, *view.head(width), *(text for text, _ in lines)]
    assert max(map(len, texts)) <= width
    assert all(text.isprintable() for text in texts)


def test_on_80_columns_there_is_who_how_much_and_what_state() -> None:
    title, _ = seen([row(1)]).lines(80, 10)
    assert title.split() == ["PID", "NAME", "DOMAIN", "MERGED*", "KNOWN", "CPU%", "STATE"]


def test_the_selected_process_stays_in_view_and_is_marked_without_colours() -> None:
    view = seen([row(n, 1000 - n) for n in range(100)])
    view.move(0)
    for _ in range(50):
        view.move(1)
    _, lines = view.lines(80, 10)
    assert [text[:2] for text, chosen in lines if chosen] == ["> "]
    assert view.selected == 50
    view.take(COUNTERS, [row(n, n) for n in range(100)], 11.0)
    assert sum(chosen for _, chosen in view.lines(80, 10)[1]) == 1


def test_selection_of_a_process_that_ended_is_given_up() -> None:
    view = seen([row(1, 5), row(2, 4)])
    view.move(1)
    view.take(COUNTERS, [row(7, 1)], 11.0)
    assert view.chosen() is None
    view.move(1)
    assert view.selected == 7


def test_domains_are_summed() -> None:
    view = seen([row(1, 5), row(2, 4), row(3, 1, domain="0")])
    view.by_domain = True
    _, lines = view.lines(80, 10)
    assert lines[0][0].split()[:2] == ["1000", "2"]
    assert view.chosen() is None


def test_to_a_guest_who_is_not_told_the_counters_its_own_processes_are_shown() -> None:
    view = View()
    view.take({"processes": 1, "merged": 256}, [row(1, 256)], 10.0)
    assert "1.0 MiB shared by your processes" in view.head(80)[0]


def test_a_sparkline_ends_with_the_last_value_and_needs_no_blocks() -> None:
    assert spark([0.0, 1.0, 2.0], 5) == "  " + BLOCKS[0] + BLOCKS[4] + BLOCKS[7]
    assert spark([0.0, 8.0], 2, ASCII) == ASCII[0] + ASCII[7]
    assert spark([-5.0, 0.0], 2) == BLOCKS[0] * 2
    assert spark([], 3) == "   "


def test_the_question_says_what_an_unmerge_needs_and_whether_it_is_there() -> None:
    one = row(9, 256)
    assert "needs 1.0 MiB" in question(one, one | {"bytes_available": 1 << 30})
    assert "enough" in question(one, one | {"bytes_available": 1 << 30})
    assert "ENOMEM" in question(one, one | {"bytes_available": 1 << 10})
    assert "not known" in question(one, None)
    assert "frozen" in question(one | {"state": "frozen"}, None)
    assert "Nothing" in question(row(9), None)


def test_on_80_columns_it_says_less_of_what_ksmd_does_rather_than_half_a_number() -> None:
    view = seen([row(1, merged=256)])
    view.doing = "merging 11,616 pages/s, looking at 14,123 pages/s, pass 1,234"
    assert view.head(80)[0].endswith("ksmd: merging 11,616 pages/s")
    assert view.head(200)[0].endswith("looking at 14,123 pages/s, pass 1,234")
