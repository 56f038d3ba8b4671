"""The directory of the private service of `samepage run`."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from samepage.service.private import _remove_those_of_killed_services


def folder_of_a_service(parent: Path, number: int, age: float) -> tuple[Path, socket.socket]:
    folder = parent / f"samepage-{number:016x}"
    folder.mkdir()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "socket"))
    listener.listen()
    then = folder.stat().st_mtime - age
    os.utime(folder, (then, then))
    return folder, listener


def test_what_killed_services_left_behind_goes_and_that_of_others_stays(tmp_path: Path) -> None:
    killed, one = folder_of_a_service(tmp_path, 1, 100)
    one.close()
    young, two = folder_of_a_service(tmp_path, 2, 0)
    two.close()
    alive, three = folder_of_a_service(tmp_path, 3, 100)
    (tmp_path / "samepage-0000000000000004").mkdir()
    (tmp_path / "samepage-notes").mkdir()
    tmp_path.chmod(0o777)
    _remove_those_of_killed_services(tmp_path)
    assert killed.exists()  # where everybody can make files, nothing is looked for
    tmp_path.chmod(0o755)
    _remove_those_of_killed_services(tmp_path)
    three.close()
    assert not killed.exists()
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3", "4", "s"]
    assert young.exists()
    assert alive.exists()
