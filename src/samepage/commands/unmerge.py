"""`samepage unmerge`."""

from __future__ import annotations

import argparse
import json
import signal
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from samepage import agent
from samepage.commands import RESERVE, CommandError, add_reserve, add_socket
from samepage.commands.streams import say
from samepage.service import sockets

if TYPE_CHECKING:
    from samepage.kernel.unmerge import Outcome
    from samepage.service.control import Client

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
        parser.add_argument(
            "--engine",
            choices=("user", "kernel"),
            default="user",
            help="whose pages: those that samepage merged (default), or those that the kernel's own ksmd did"
            ", of any process",
        )
        add_reserve(parser)
        parser.set_defaults(reserve=None)
        parser.add_argument("--json", action="store_true", help="print how far it came as one JSON object")

        self._parser = parser

    def run(self, args: argparse.Namespace) -> int:
        from samepage.service.control import Client

        if args.engine == "kernel":
            return self._of_the_kernel(args)
        if args.reserve is not None:
            self._parser.error("--reserve is the service's, or for --engine kernel")
        with Client(sockets.find(args.socket), timeout=None) as client:
            outcome = _last(client, args.pid)
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

    def _of_the_kernel(self, args: argparse.Namespace) -> int:
        """One process after the other; with an error the others go on, for they may have other limits."""
        from samepage.commands.attach import Cancelled
        from samepage.kernel.target import TargetError
        from samepage.kernel.unmerge import Merged, processes, unmerge

        merged, cancelled, outcomes, refused = Merged(), Cancelled(), [], False
        for pid in args.pid or processes():
            try:
                outcomes.append(unmerge(pid, merged, args.reserve or RESERVE, cancelled=cancelled))
            except TargetError as e:
                refused = True
                say(str(e))
        failed = [outcome for outcome in outcomes if outcome.errno is not None]
        total = sum(outcome.pages_unmerged for outcome in outcomes)
        if args.json:
            rows = [asdict(outcome) for outcome in outcomes]
            print(
                json.dumps({"errno": failed[0].errno if failed else None, "pages_unmerged": total, "processes": rows})
            )
        elif not failed:
            print(f"{total} pages unmerged")
        for outcome in failed:
            say(f"process {outcome.pid}: {explain(outcome)}")
        return 1 if failed or refused else 0


def _last(client: Client, pids: list[int]) -> dict[str, Any]:
    """The final packet. Ctrl-C cancels the unmerge, and the final packet then says how far it came."""
    cancel = signal.signal(signal.SIGINT, lambda *_: client.cancel())
    try:
        for packet in client.stream("unmerge", pids=pids):
            last = packet
        return last
    finally:
        signal.signal(signal.SIGINT, cancel)


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
        return (
            f"the next step needs {needed_mib:.1f} MiB and there are {there_mib:.1f}: free some memory and call again"
        )
    return "interrupted; calling again goes on" if errno == "EINTR" else ""
