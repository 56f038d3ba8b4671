"""`samepage unmerge`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from samepage import agent
from samepage.commands import CommandError, add_socket, engines
from samepage.commands.attach import Cancelled
from samepage.commands.streams import say

if TYPE_CHECKING:
    from samepage.kernel.unmerge import Outcome

MIB = 1 << 20


class Unmerge:
    """Give merged pages private copies again, as long as there is memory for them.

    Stops with ENOMEM before the memory runs out; what was done stays done, the rest stays merged, and calling
    again goes on. So does Ctrl-C. A process that does not answer is passed over, and named at the end, with an error;
    it is unmerged as soon as it answers.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_socket(parser)
        parser.add_argument(
            "--pid", metavar="PID", type=int, action="append", default=[], help="only this process; may be repeated"
        )
        engines.add_engine(parser, "whose pages: those of the service's processes (default)")
        parser.add_argument("--json", action="store_true", help="print how far it came as one JSON object")
        self._parser = parser

    def run(self, args: argparse.Namespace) -> int:
        with engines.chosen(self._parser, args) as engine:
            outcome = engine.unmerge(args.pid, lambda _: None, Cancelled())
        if "error" in outcome and "pages_unmerged" not in outcome:
            raise CommandError(outcome["error"])
        outcome.pop("ok")
        if args.json:
            print(json.dumps(outcome))
        elif outcome["errno"] is None:
            print(f"{outcome['pages_unmerged']} pages unmerged")
        if outcome["errno"] is not None:
            say(how_far(outcome))
        return 0 if outcome["errno"] is None else 1


def how_far(outcome: dict[str, Any]) -> str:
    """How far an unmerge by a service came, and what stopped it."""
    from samepage.service.control import blamed

    why = _why(outcome["errno"], outcome["bytes_needed"], outcome["bytes_available"], outcome["limits_unseen"])
    said = "; ".join(filter(None, [why, blamed(outcome["failed"])])) or outcome["errno"]
    return f"{outcome['pages_unmerged']} pages unmerged, {outcome['pages_remaining']} remain merged: {said}"


def explain(outcome: Outcome) -> str:
    """How far an unmerge of the kernel's pages came, and what stopped it."""
    why = _why(outcome.errno, outcome.bytes_needed, outcome.bytes_available, outcome.limits_unseen)
    said = why or outcome.errno
    return f"{outcome.pages_unmerged} pages unmerged, {outcome.pages_remaining} remain merged: {said}"


def _why(errno: str | None, needed: int, there: int, unseen: bool) -> str:
    if unseen:
        return f"nothing is risked, for {agent.UNSEEN}"
    if errno == "ENOMEM":
        needed_mib, there_mib = needed / MIB, there / MIB
        return f"the rest needs {needed_mib:.1f} MiB and there are {there_mib:.1f}: free some memory and call again"
    return "interrupted; calling again goes on" if errno == "EINTR" else ""
