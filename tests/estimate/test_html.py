"""The page, in headless Chromium: it opens offline, draws the map, and says what is under the pointer."""

from __future__ import annotations

import html as entities
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samepage.estimate import html, predict, report
from samepage.estimate.look import look
from samepage.estimate.process import Process
from samepage.memory import PAGE_SIZE
from tests.estimate.fake import FakeSource, Page
from tests.estimate.subject import Subject

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs headless Chromium (Debian: chromium)")

QUIET = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --hide-scrollbars --virtual-time-budget=5000"
)


def page_of(*sources: Any, sample: float | None = None) -> str:
    seen = look(sources, sample=sample)
    host = predict.this_host()
    analysis = predict.analyse(seen, host)
    return html.page(report.build(seen, host, analysis, None, "test"), html.cells(seen, analysis.classes))


@pytest.fixture(scope="module")
def twenty() -> Iterator[str]:
    """The page of a scan of 20 processes: five with memory of their own, each with three forks."""
    subjects = [Subject() for _ in range(5)]
    forks = []
    try:
        for i, one in enumerate(subjects):
            one.region(1500)
            forks += [int(one.do("out = os.fork() or (signal.pause() and 0)")) for _ in range(3)]
            own = [*[5_000 + i, 6_000 + i] * 150, *range(10_000 * i, 10_000 * i + 500)]
            one.fill(0, [*[0] * 200, *range(1, 401), *own])
        yield page_of(*(Process(pid) for pid in sorted([*forks, *(one.pid for one in subjects)])))
    finally:
        for pid in forks:
            os.kill(pid, signal.SIGKILL)
        for one in subjects:
            with one:
                pass


def chromium(directory: Path, page: str, *options: str, fragment: str = "") -> str:
    """What Chromium prints of the page."""
    file = directory / "page.html"
    file.write_text(page, encoding="utf-8")
    profile = directory / "profile"
    command = [str(CHROMIUM), *QUIET.split(), f"--user-data-dir={profile}", *options, f"file://{file}{fragment}"]
    home = os.environ | {"HOME": str(directory)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=home)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout


def ask(directory: Path, page: str, script: str, fragment: str = "") -> Any:
    """Open the page, run `script` in it as its last, and give back what that returns."""
    answer = f"<script>document.title = JSON.stringify((() => {{ {script} }})());</script></body>"
    dom = chromium(directory, page.replace("</body>", answer), "--dump-dom", fragment=fragment)
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title, dom[:1000]
    return json.loads(entities.unescape(title[1]))


LOOK_AT_IT = """
const hex = name => { const g = document.createElement("canvas").getContext("2d"); g.fillStyle = colours[name];
  g.fillRect(0, 0, 1, 1); return [...g.getImageData(0, 0, 1, 1).data].join(); };
const names = Object.fromEntries(KINDS.map(([name]) => [hex(name), name]));
const seen = {};
const canvases = [...document.querySelectorAll("canvas")];
for (const canvas of canvases) {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) {
    const name = names[[...data.subarray(i, i + 4)].join()];
    if (name) seen[name] = (seen[name] || 0) + 1;
  }
}
const over = (lane, cell) => {
  const box = lane.canvas.getBoundingClientRect();
  const at = {clientX: box.left + (cell % lane.columns + .5) * CELL_W, clientY: box.top + 3, bubbles: true};
  lane.canvas.dispatchEvent(new MouseEvent("mousemove", at));
};
const linked = document.getElementById("tip").innerText;
over(lanes[0], 3);
const hovered = document.getElementById("tip").innerText;
lanes[0].canvas.dispatchEvent(new MouseEvent("mouseleave"));
const gone = document.getElementById("tip").hidden;
lanes[1].canvas.focus();
for (let i = 0; i < 3; i++) lanes[1].canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
const said = document.getElementById("said").textContent;
document.querySelector(".matrix td:not(.self)").dispatchEvent(
  new MouseEvent("mousemove", {clientX: 50, clientY: 50, bubbles: true}));
const pair = document.getElementById("tip").innerText;
const background = () => getComputedStyle(document.body).backgroundColor;
const before = background();
document.getElementById("theme").click();
const after = background();
document.querySelector("details summary").click();
return {
  canvases: canvases.length, seen, linked, hovered, gone, said, pair, before, after,
  labels: canvases.map(c => c.getAttribute("aria-label")),
  cells: document.querySelectorAll(".matrix td").length,
  rows: document.querySelectorAll("#processes tbody tr").length,
  wide: document.documentElement.scrollWidth <= innerWidth,
  requests: performance.getEntriesByType("resource").length,
};
"""


@needs_chromium
def test_a_person_sees_the_map_of_twenty_processes_and_what_is_under_the_pointer(twenty: str, tmp_path: Path) -> None:
    shown = ask(tmp_path, twenty, LOOK_AT_IT, "#light&at=2,4")
    assert shown["canvases"] == shown["rows"] == 20
    assert set(shown["seen"]) == {"unique", "zero", "inside", "between", "shared"}
    assert min(shown["seen"].values()) > 100
    assert re.match(r"python[\d.]* \(\d+\): .+\n.*this cell: \d", shown["hovered"])
    assert "this cell" in shown["linked"]
    assert shown["gone"] is True
    assert re.search(r"\d [KM]iB", shown["said"])
    assert "in common" in shown["pair"]
    assert all(re.match(r"Memory of python[\d.]* \(\d+\): Unique .*Shared already", label) for label in shown["labels"])
    assert shown["cells"] >= 25
    assert shown["wide"] is True
    assert shown["requests"] == 0
    assert (shown["before"], shown["after"]) == ("rgb(255, 255, 255)", "rgb(18, 22, 29)")


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_photographed_light_and_dark(twenty: str, tmp_path: Path, theme: str) -> None:
    picture = tmp_path / "picture.png"
    chromium(tmp_path, twenty, f"--screenshot={picture}", "--window-size=1200,1600", fragment=f"#{theme}&at=0,5")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 30_000


@needs_chromium
def test_a_name_is_never_taken_for_a_part_of_the_page(tmp_path: Path) -> None:
    evil = '</script><img src=x onerror="document.body.innerHTML=1">&amp;{{data}}'
    page = page_of(FakeSource([(1, Page(1, 1)), (2, Page(1, 2))], name=evil))
    assert ask(tmp_path, page, "return [lanes.length, document.images.length, label(report.sources[0])]") == [
        1,
        0,
        f"{evil} (1)",
    ]


def test_the_page_asks_nobody_for_anything(twenty: str) -> None:
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", twenty)
    assert "default-src 'none'" in twenty


def test_the_page_stays_small_however_much_memory_there_is() -> None:
    rng = np.random.default_rng(1)
    pages = [(vpn, Page(int(rng.integers(0, 50)), vpn)) for vpn in range(1, 3000)]
    sources = [FakeSource(pages, pid=pid, batch=3000) for pid in range(1, 31)]
    seen = look(sources)
    cells = html.cells(seen, predict.analyse(seen, predict.this_host()).classes)
    count = sum(len(text) for text in cells.sources) * 3 // 4 // 4
    assert count <= html.CELLS + 30
    assert cells.bytes == 16 * PAGE_SIZE
    assert sum(rows.npages for rows in seen.sources) <= count * 16


def test_the_page_of_a_sample_has_cells_of_the_pages_it_stands_for() -> None:
    pages = [(vpn, Page(vpn, vpn)) for vpn in range(1, 4001)]
    seen = look([FakeSource(pages, batch=1000)], sample=0.25)
    cells = html.cells(seen, predict.analyse(seen, predict.this_host()).classes)
    count = len(cells.sources[0]) * 3 // 4 // 4
    assert abs(count * cells.bytes / PAGE_SIZE - 4000) < 600
