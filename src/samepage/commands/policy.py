"""`samepage policy`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samepage.commands import CommandError
from samepage.service import sockets

if TYPE_CHECKING:
    from samepage.service.policy import Policy

NAMES_MAX = 4


class PolicyCommand:
    """See what a policy of the daemon's says.

    `samepage policy check [FILE]` reads it as the daemon would, and shows for the processes that run now which merge
    domain each would be in and by which rule. The exit status is 1 when it is wrong.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        actions = parser.add_subparsers(metavar="ACTION", required=True)
        parser = actions.add_parser("check", help="read a policy, and see what it means", description=self.__doc__)
        parser.add_argument(
            "policy", metavar="FILE", nargs="?", help=f"the policy (default: {sockets.POLICY_PATH}, if it is there)"
        )
        parser.add_argument("--pid", type=int, action="append", help="this process only; can be given more than once")
        parser.add_argument("--json", action="store_true", help="print one JSON object, with a row for each process")

    def run(self, args: argparse.Namespace) -> int:
        from samepage.service.policy import Policy, load

        path = args.policy or (sockets.POLICY_PATH if os.path.lexists(sockets.POLICY_PATH) else None)
        rows = list(_rows(load(path) if path else Policy(), args.pid))
        for pid in set(args.pid or []) - {row["pid"] for row in rows}:
            raise CommandError(f"there is no process {pid}, or it cannot be seen who it is")
        if args.json:
            print(json.dumps({"policy": path, "processes": rows}, indent=1))
        else:
            print(f"{path}: all right" if path else "no policy: each user, user namespace and container by itself")
            _print(rows)
        return 0


def _rows(policy: Policy, pids: list[int] | None) -> Iterator[dict[str, Any]]:
    """Where the processes belong that run now; not kernel threads."""
    from samepage.process.identity import identify
    from samepage.service.cgroups import group_of

    for pid in pids or sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with contextlib.suppress(OSError):  # it ended, or is none of ours
            who = identify(pid)
            if not who.stack and not pids:
                continue
            group = group_of(pid)
            place = policy.place(who, group)
            yield {
                "pid": pid,
                "comm": Path(f"/proc/{pid}/comm").read_bytes().decode(errors="replace").rstrip("\n"),
                "user": who.uids[0],
                "cgroup": os.fsencode(group.path).decode(errors="backslashreplace"),
                "container": group.container,
                "domain": str(place.domain) if place.domain else None,
                "why": place.why,
            }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    places: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault((row["domain"] or "off", row["why"]), []).append(row)
    table = Table("merge domain", "by", "processes", "which", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for (domain, why), those in sorted(places.items(), key=lambda place: -len(place[1])):
        names = [f"{row['comm']} ({row['pid']})" for row in those[:NAMES_MAX]]
        names += ["…"] if len(those) > NAMES_MAX else []
        table.add_row(Text(domain), Text(why), str(len(those)), Text(", ".join(names)))
    Console(width=None if os.isatty(1) else 1000, highlight=False).print(table)
