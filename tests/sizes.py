"""No file over 500 lines, no function over 50, no class over 20 methods, but for the exceptions here, each with its
reason. `make check` runs it; ruff counts statements and public methods, and knows nothing of C."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES, METHODS = 500, 50, 20

EXCEPTIONS = {
    "src/samepage/agent/hooks/wrappers.c: syscall()": "a list: one case for each system call that has a wrapper",
    "src/samepage/commands/run.py: prepare_parser()": "a list: one option after the other",
    "src/samepage/fleet/space.py: class RecordedAddressSpace": "the protocol of address spaces alone has sixteen",
    "src/samepage/kernel/settings.py: class Settings": "what was found and is put back: one file, one lock",
    "src/samepage/ksmd/stable.py: class StableTree": "four of its methods look whether its own books agree",
    "src/samepage/memory/__init__.py: class AddressSpace": "the protocol: all that ksmd may ask of a process",
    "src/samepage/service/scanner.py: class Scanner": "whatever anybody asks of ksmd goes by its gate, one at a time",
    "src/samepage/service/server.py: class Server": "one loop, and what it does for each kind of descriptor",
    "tests/agent/calls.c": "a list: every call that changes a mapping, and what it must return",
    "tests/agent/calls.c: resizing()": "one story: each step builds on the mappings that the last one left",
    "tests/agent/torture.c: main()": "the command line, and the threads that it asks for",
    "tests/agent/torture.c: region_op()": "a list: one case for each operation that torture makes",
    "tests/fuzz/model/main.c": "the random choice of calls; what each must do is in files of its own",
    "tests/ksmd/test_ksmd_stateful.py: class KsmdMachine": "hypothesis wants a method for each rule",
}


def main() -> int:
    """1 if something is too large, or an exception is none any more."""
    paths = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.[ch]"], text=True)
    found = dict(size for path in paths.split() if Path(path).exists() for size in _too_large(path))
    wrong = [f"{what}: {size}" for what, size in found.items() if what not in EXCEPTIONS]
    wrong += [f"{what}: no exception is needed any more" for what in EXCEPTIONS.keys() - found]
    print("\n".join(wrong) or f"sizes: {len(EXCEPTIONS)} exceptions")
    return 1 if wrong else 0


def _too_large(path: str) -> Iterator[tuple[str, str]]:
    text = Path(path).read_text()
    lines = text.splitlines()
    if len(lines) > FILE_LINES:
        yield path, f"{len(lines)} lines"
    for name, n in _functions_of_c(lines) if path[-2:] in (".c", ".h") else _functions_of_python(text):
        if n > FUNCTION_LINES:
            yield f"{path}: {name}()", f"{n} lines"
    if path.endswith(".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) for child in node.body)
                if methods > METHODS:
                    yield f"{path}: class {node.name}", f"{methods} methods"


def _functions_of_python(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def _functions_of_c(lines: list[str]) -> Iterator[tuple[str, int]]:
    """Lines between braces. clang-format puts those of functions into the first column, and the name before."""
    for i, line in enumerate(lines):
        if line == "{" and i:
            start = i - 1
            while start and lines[start][:1] in ("\t", " "):  # arguments that go on
                start -= 1
            end = lines.index("}", i)
            yield lines[start].split("(")[0].split()[-1].lstrip("*"), end - i - 1


if __name__ == "__main__":
    sys.exit(main())
