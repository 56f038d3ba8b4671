"""The live view: a thin layer of textual over `view`, with no colours, so that it looks the same in every terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click, Resize
from textual.screen import ModalScreen
from textual.widgets import Static

from samepage.top.view import SORTS, View, question, steps

EVERY = 1.0
"""Seconds between two looks."""

KEYS = "q quit  up/down select  u unmerge  s stop/go on  d domains  sort: m k c p n"

Row = dict[str, Any]


class Source(Protocol):
    """`samepage.top.source.Service`. Each may raise OSError, whose `strerror` is shown."""

    path: str

    def look(self) -> tuple[Row, list[Row]]: ...
    def available(self, pid: int) -> Row | None: ...
    def set_run(self, run: int) -> None: ...
    def unmerge(self, pid: int) -> Row: ...


class Ask(ModalScreen[bool]):
    """A question, to be answered by y or n."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)"),
        Binding("n,escape,q,enter", "answer(False)"),
    ]
    CSS = """
    Ask { align: center middle; background: ansi_default; }
    Ask Static { width: auto; height: auto; max-width: 100%; background: ansi_default; color: ansi_default; }
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def compose(self) -> ComposeResult:
        yield Static(Content(f"{self.text}\n\ny yes    n no"))

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class Top(App[None]):
    """Watches `source`. `explain` says in words how an unmerge ended."""

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit"),
        Binding("up", "move(-1)"),
        Binding("down", "move(1)"),
        Binding("pageup", "page(-1)"),
        Binding("pagedown", "page(1)"),
        Binding("home", "move(-1000000)"),
        Binding("end", "move(1000000)"),
        Binding("u", "unmerge"),
        Binding("s", "stop"),
        Binding("d", "domains"),
        *(Binding(key, f"sort({column!r})") for key, column in SORTS.items()),
    ]
    CSS = """
    Screen { layout: vertical; background: ansi_default; color: ansi_default; }
    Static { background: ansi_default; color: ansi_default; }
    #head { height: 4; }
    #table { height: 1fr; }
    #message, #keys { height: 1; }
    """

    def __init__(self, source: Source, explain: Callable[[Row], str], every: float = EVERY) -> None:
        super().__init__(ansi_color=True)
        self.source = source
        self.view = View(steps())
        self.message = ""
        self._explain = explain
        self._every = every
        self._lost = False  # the service, when last asked

    def compose(self) -> ComposeResult:
        for name in ("head", "table", "message"):
            yield Static(id=name)
        yield Static(Content(KEYS), id="keys")

    def on_mount(self) -> None:
        self.look()
        self.set_interval(self._every, self.look)

    def look(self) -> None:
        """Ask the service, in a thread, for it may not answer."""
        if not any(worker.group == "look" and worker.is_running for worker in self.workers):
            self.run_worker(self._look, thread=True, group="look")

    def _look(self) -> None:
        try:
            counters, rows = self.source.look()
        except OSError as e:
            self._lost = True
            self.call_from_thread(self._say, e.strerror or str(e))
            return
        self.call_from_thread(self._take, counters, rows)

    def _take(self, counters: Row, rows: list[Row]) -> None:
        self.view.take(counters, rows, time.monotonic())
        if self._lost:
            self.message, self._lost = "", False
        if self.view.chosen() is None:
            self.view.move(0)
        self.draw()

    def _say(self, message: str) -> None:
        self.message = message
        self.draw()

    def on_resize(self, _: Resize) -> None:
        self.draw()

    def draw(self) -> None:
        """Show the view as it is now."""
        if not self.screen_stack:  # an answer came while it ends
            return
        screen = self.screen_stack[0]
        width, height = self.size
        if not width or not screen.query("#head"):
            return
        name = f"samepage top   {self.source.path}"
        clock = time.strftime("%H:%M:%S")
        first = (name[: width - 10].ljust(width - 8) + clock)[:width]
        screen.query_one("#head", Static).update(Content("\n".join([first, *self.view.head(width)])))
        title, lines = self.view.lines(width, max(1, height - 7))
        table = Content.styled(title.ljust(width), "reverse")
        for text, chosen in lines:
            table = table.append(Content("\n")).append(Content.styled(text.ljust(width), "bold") if chosen else text)
        screen.query_one("#table", Static).update(table)
        screen.query_one("#message", Static).update(Content(self.message[:width]))

    # -- keys -------------------------------------------------------------------------------------------

    def action_move(self, by: int) -> None:
        self.view.move(by)
        self.draw()

    def action_page(self, by: int) -> None:
        self.action_move(by * max(1, self.size.height - 8))

    def on_click(self, event: Click) -> None:
        _, lines = self.view.lines(self.size.width, max(1, self.size.height - 7))
        at = next((n for n, (_, chosen) in enumerate(lines) if chosen), None)
        if at is not None and 5 <= event.screen_y < 5 + len(lines):
            self.action_move(event.screen_y - 5 - at)

    def action_sort(self, column: str) -> None:
        self.view.choose(column)
        self.draw()

    def action_domains(self) -> None:
        self.view.by_domain = not self.view.by_domain
        self.draw()

    def action_stop(self) -> None:
        run = 0 if self.view.counters.get("run", 1) == 1 else 1
        self._in_thread(lambda: self.source.set_run(run), lambda _: "stopped" if run == 0 else "merging goes on")

    def action_unmerge(self) -> None:
        row = self.view.chosen()
        if row is None:
            self._say("select a process first")
            return
        pid = row["pid"]

        def ask() -> None:
            try:
                full = self.source.available(pid)
            except OSError:
                full = None
            self.call_from_thread(
                self.push_screen, Ask(question(row, full)), lambda yes: self._unmerge(pid) if yes else None
            )

        self.run_worker(ask, thread=True)

    def _unmerge(self, pid: int) -> None:
        self._say(f"process {pid} is being unmerged")
        self._in_thread(lambda: self.source.unmerge(pid), lambda outcome: f"process {pid}: {self._explain(outcome)}")

    def _in_thread(self, work: Callable[[], Any], told: Callable[[Any], str]) -> None:
        """Do what may take long, and say what came of it."""

        def run() -> None:
            try:
                said = told(work())
            except OSError as e:
                said = e.strerror or str(e)
            self.call_from_thread(self._say, said)
            self.call_from_thread(self.look)

        self.run_worker(run, thread=True)
