"""Man pages and completions, from the same parser that reads the command line.

    python packaging/manual.py FOLDER

puts man1/*.1 and samepage.bash, _samepage and samepage.fish into FOLDER.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import shtab

import samepage
from samepage.commands import parser as whole

SHELLS = {"bash": "samepage.bash", "zsh": "_samepage", "fish": "samepage.fish"}

FILES = """.SH FILES
.TP
.I /run/samepage.sock
where root's daemon listens
.TP
.I $XDG_RUNTIME_DIR/samepage.sock
where a user's own does
.TP
.I /etc/default/samepage
options of the daemon that systemd starts
"""

ENVIRONMENT = """.SH ENVIRONMENT
.TP
.B SAMEPAGE_SOCKET
the service to talk to, where \\fB\\-\\-socket\\fR does not say it; set for whatever runs under \\fBsamepage run\\fR
"""


def escaped(text: str) -> str:
    """For roff: a line must not begin with a dot or an apostrophe, and hyphens are hyphens that can be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in text.split("\n"))


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Its subcommands, and theirs, by the names of their pages."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                found |= {one.prog.replace(" ", "-"): one} | commands(one)
    return found


def page(name: str, parser: argparse.ArgumentParser, see: list[str]) -> str:
    """One man page."""
    doc = inspect.cleandoc(parser.description or "")
    summary, _, rest = doc.partition("\n")
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    parts = [f'.TH {name.upper()} 1 "" "samepage {samepage.__version__}" "User Commands"']
    parts += [".SH NAME", f"{escaped(name)} \\- {escaped(summary.rstrip('.'))}"]
    parts += [".SH SYNOPSIS", f".nh\n{escaped(usage)}\n.hy"]
    if rest.strip():
        parts += [".SH DESCRIPTION", *(".PP\n" + escaped(part) for part in rest.strip().split("\n\n"))]
    if options := [item for action in parser._actions for item in option(parser, action)]:
        parts += [".SH OPTIONS", *options]
    if found := subcommands(parser):
        parts += [".SH COMMANDS", *found, FILES, ENVIRONMENT]
    else:
        parts += [
            ".SH EXIT STATUS",
            "0, 1 for a failure with one line on stderr, or 2 for wrong usage, unless said otherwise.",
        ]
    parts += [".SH SEE ALSO", ",\n".join(f".BR {escaped(other)} (1)" for other in see).replace(",\n", "\n")]
    return "\n".join(parts) + "\n"


def option(parser: argparse.ArgumentParser, action: argparse.Action) -> list[str]:
    if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
        return []
    formatter = parser._get_formatter()
    shown = formatter._format_action_invocation(action)
    text = (action.help or "") % {"default": action.default, "prog": parser.prog}
    return [".TP", f"\\fB{escaped(shown)}\\fR", escaped(text) or "\\&"]


def subcommands(parser: argparse.ArgumentParser) -> list[str]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    lines: list[str] = []
    for action in actions:
        for choice in action._choices_actions:
            name = action.choices[choice.dest].prog.replace(" ", "-")
            lines += [".TP", f".BR {escaped(name)} (1)", escaped(choice.help or "")]
    return lines


def main() -> None:
    folder = Path(sys.argv[1])
    parser = whole()
    (folder / "man1").mkdir(parents=True, exist_ok=True)
    names = commands(parser)
    for name, subparser in {"samepage": parser, **names}.items():
        others = sorted({"samepage", *names} - {name})
        see = (
            others
            if name == "samepage"
            else ["samepage", *(n for n in others if n in ("samepage-run", "samepage-daemon"))]
        )
        (folder / "man1" / f"{name}.1").write_text(page(name, subparser, see))
    for subparser in names.values():  # shells show it beside the name
        subparser.description = (subparser.description or "").partition("\n")[0]
    for shell, file in SHELLS.items():
        (folder / file).write_text(shtab.complete(parser, shell=shell))


if __name__ == "__main__":
    main()
