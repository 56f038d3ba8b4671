"""/sys/kernel/mm/ksm: switched on while somebody needs it, and restored afterwards.

Before anything is changed, the settings found are written down, together with the processes that need ksmd (holders).
So when all of these have ended, in whatever way, the next samepage can restore the settings. The file belongs to root,
as the knobs do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

KNOBS = Path("/sys/kernel/mm/ksm")
STATE = Path("/run/samepage-kernel.json")


class SettingsError(Exception):
    """Why ksmd is not available, in one line."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


def start_time(pid: int) -> int | None:
    """When a process started, in ticks, which tells it from a later one of the same number. None: it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] in "ZX" else int(stat[19])


def tuner() -> int | None:
    """The pid of a ksmtuned, which sets the same files."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text() == "ksmtuned\n":
                return int(comm.parent.name)
    return None


def _chosen(text: str) -> str:
    """Of several values, the one in brackets."""
    return text.partition("[")[2].partition("]")[0] or text.strip()


class Settings:
    """The knobs. Other files than the kernel's are for tests."""

    def __init__(self, knobs: Path = KNOBS, state: Path = STATE) -> None:
        self._knobs, self._state = knobs, state

    def available(self) -> None:
        """Raise `SettingsError` if this user cannot set the knobs."""
        if not (self._knobs / "run").exists():
            raise SettingsError("this kernel has no KSM (CONFIG_KSM)")
        if not os.access(self._knobs / "run", os.W_OK):
            raise SettingsError("only root can start the kernel's ksmd")

    def usable(self) -> bool:
        """Whether ksmd runs, or can be started by this user."""
        try:
            self.available()
        except SettingsError:
            return (self._knobs / "run").exists() and self.running()
        return True

    def files(self) -> dict[str, str]:
        """The contents of the kernel's files."""
        found = {}
        for file in sorted(self._knobs.iterdir()):
            with contextlib.suppress(OSError):
                found[file.name] = file.read_text()
        return found

    def counters(self) -> dict[str, int]:
        """All counters, by name."""
        return {name: int(text) for name, text in self.files().items() if not self._is_knob(name)}

    def knobs(self) -> dict[str, str]:
        """All knobs, by name."""
        return {name: _chosen(text) for name, text in self.files().items() if self._is_knob(name)}

    def write(self, name: str, value: str) -> None:
        """Set a knob, for good. `SettingsError` with the kernel's errno."""
        self.available()
        self._write(name, value)

    def holders(self) -> set[int]:
        """The processes for which knobs are held. Empty if this user may not know."""
        try:
            with open(os.open(self._state, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
                return {int(pid) for pid in json.load(file)["holders"]}
        except (OSError, ValueError):
            return set()

    def _is_knob(self, name: str) -> bool:
        return bool((self._knobs / name).stat().st_mode & 0o200)

    def running(self) -> bool:
        """Whether ksmd merges."""
        return self._read("run") == "1"

    def hold(self, pids: list[int], wanted: Mapping[str, str]) -> None:
        """Set knobs for as long as one of these processes lives. Knobs that somebody holds already stay as they are."""
        self.available()
        if other := tuner():
            raise SettingsError(f"ksmtuned (process {other}) sets the files of /sys/kernel/mm/ksm: stop it first")
        with self._locked():
            state = self._recovered()
            if state is None:
                found = {name: self._read(name) for name in wanted}
                state = {"found": found, "set": {}, "holders": {}}
            new = {name: value for name, value in wanted.items() if name not in state["set"]}
            for name in new:
                state["found"].setdefault(name, self._read(name))
            state["set"] |= new
            state["holders"] |= {str(pid): started for pid in pids if (started := start_time(pid)) is not None}
            self._save(state)
            for name, value in new.items():
                self._write(name, value)

    def change(self, values: Mapping[str, str]) -> None:
        """Change knobs while they are held. Raises `SettingsError`, and changes none, if somebody else has changed one
        since."""
        with self._locked():
            state = self._recovered()
            if state is None:
                return
            for name in values:
                now = self._read(name)
                if now != state["set"].setdefault(name, now):
                    raise SettingsError(f"somebody else has set {name}")
                state["found"].setdefault(name, now)
            state["set"] |= values
            self._save(state)
            for name, value in values.items():
                self._write(name, value)

    def lead(self) -> bool:
        """Whether this process sets the pace: the first living one of those that want to."""
        with self._locked():
            state = self._recovered()
            if state is None:
                return False
            leader = state.get("leader")
            if leader is None or start_time(leader[0]) != leader[1]:
                leader = [os.getpid(), start_time(os.getpid())]
                self._save(state | {"leader": leader})
            return bool(leader[0] == os.getpid())

    def found(self, name: str, otherwise: str) -> str:
        """A file's contents before anybody held it."""
        with self._locked():
            state = self._recovered()
            return str((state or {"found": {}})["found"].get(name, self.read(name, otherwise)))

    def read(self, name: str, otherwise: str) -> str:
        """A file's contents; `otherwise` if the kernel has no such file."""
        try:
            return self._read(name)
        except SettingsError:
            return otherwise

    def release(self, pids: list[int]) -> None:
        """Release the knobs for these processes; the last release restores what was found."""
        self.recover(pids)

    def recover(self, but: list[int] | None = None) -> None:
        """Restore settings that a samepage found and did not restore before it ended. Does nothing unless this user is
        root."""
        if os.access(self._knobs / "run", os.W_OK) and self._state.exists():
            with self._locked():
                self._recovered(but or [])

    def _recovered(self, but: list[int] | None = None) -> dict[str, Any] | None:
        """The state, with the holders that still live. None if there are none; then everything has been restored."""
        try:
            with open(os.open(self._state, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
                state: dict[str, Any] = json.load(file)
        except (OSError, ValueError):
            return None
        left = {
            pid: started
            for pid, started in state["holders"].items()
            if int(pid) not in (but or []) and start_time(int(pid)) == started
        }
        if left:
            if left != state["holders"]:
                self._save(state | {"holders": left})
            return state | {"holders": left}
        for name, value in state["set"].items():
            if self._read(name) == value:  # else somebody has set it since
                found = state["found"][name]
                # 2 would have the kernel unmerge what others merged, at once.
                self._write(name, "0" if name == "run" and found == "2" else found)
        self._state.unlink(missing_ok=True)
        return None

    def _read(self, name: str) -> str:
        try:
            text = (self._knobs / name).read_text().strip()
        except OSError as e:
            raise SettingsError(f"{name}: {e.strerror}") from e
        return _chosen(text)

    def _write(self, name: str, value: str) -> None:
        try:
            (self._knobs / name).write_text(value)
        except OSError as e:
            raise SettingsError(f"cannot set {name} to {value}: {e.strerror}", e.errno) from e

    def _save(self, state: dict[str, Any]) -> None:
        temporary = self._state.with_name(f".{self._state.name}.{os.urandom(8).hex()}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._state)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self._state.with_suffix(".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)
