"""The file that a policy is read from: whoever could change it could say who shares with whom."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from samepage.service.policy import PolicyError, load

NOBODY = 65534


def test_a_policy_that_others_could_change_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("")
    load(str(file))
    file.chmod(0o666)
    with pytest.raises(PolicyError, match="could be changed by others"):
        load(str(file))
    file.chmod(0o600)
    with pytest.raises(PolicyError, match="no regular file"):
        load(str(tmp_path))
    with pytest.raises(PolicyError, match="No such file"):
        load(str(tmp_path / "none"))
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(PolicyError, match="no regular file"):
        load(str(tmp_path / "fifo"))


def test_a_policy_that_others_could_replace_is_not_read(tmp_path: Path) -> None:
    """With an empty file of root's, say, which there always is somewhere: then nothing is "off" any more."""
    file = tmp_path / "policy.toml"
    file.write_text("")
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    load(str(tmp_path / "link"))
    tmp_path.chmod(0o777)
    for name in ("policy.toml", "link"):
        with pytest.raises(PolicyError, match=f"could be replaced by others, who may write to {tmp_path}"):
            load(str(tmp_path / name))
    if os.geteuid() == 0:
        tmp_path.chmod(0o1777)
        load(str(tmp_path / "link"))
        os.lchown(tmp_path / "link", NOBODY, NOBODY)
        with pytest.raises(PolicyError, match=r"who may write to .*link"):
            load(str(tmp_path / "link"))
        os.chown(tmp_path, NOBODY, NOBODY)
        with pytest.raises(PolicyError, match="replaced"):
            load(str(file))
        os.chown(tmp_path, 0, 0)
