"""`samepage doctor`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from samepage.commands import add_swap
from samepage.doctor.facts import look
from samepage.doctor.findings import Finding, examine, hindrance, too_old, way_to_swap


class Doctor:
    """Say what this machine and this user get, and what to change.

    The exit status is 1 if memory is not merged by itself here.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        add_swap(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def run(self, args: argparse.Namespace) -> int:
        facts, chosen = look(), args.swap or "move"
        findings = examine(facts, chosen)
        why = too_old(facts) or hindrance(facts, chosen)
        if args.json:
            answer = {"merges": not why, "why": why, "swap": way_to_swap(facts, chosen)}
            print(json.dumps(answer | {"facts": asdict(facts), "findings": [asdict(f) for f in findings]}, indent=1))
        else:
            for finding in findings:
                _print(finding)
            print(f"\n{why or 'memory is merged here'}")
        return 1 if why else 0


def _print(finding: Finding) -> None:
    print(f"{finding.state:5} {finding.name:17} {finding.value}")
    for what in filter(None, (finding.means, finding.change and f"to change that: {finding.change}")):
        print(f"{'':24}{what}")
