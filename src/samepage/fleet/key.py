"""The key of a fleet, and the hashes that are made with it.

A plain hash of a page would show whether a machine holds a known page. So recordings have SipHash-2-4 of the checksum,
under a key. All hosts of a fleet must have the same key, or their recordings have nothing in common. Hence samepage
never makes a key unasked: one host makes it, people copy it to the others, and every recording has a fingerprint of its
key.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samepage.fleet import FleetError
from samepage.memory import U64

DEFAULT = Path("/etc/samepage/fleet.key")
BYTES = 16

ZERO = 0
"""The hash of a page of zeros under any key, since all hosts have those."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of 128 bits. Only its `name` is ever shown."""

    secret: bytes

    @property
    def name(self) -> str:
        """Its fingerprint in recordings, which reveals nothing of the key."""
        return hashlib.sha256(b"samepage fleet key" + self.secret).hexdigest()[:16]

    def hashes(self, checksums: U64, zero: int) -> U64:
        """The keyed hash of each checksum; `ZERO` of `zero`, which is that of a page of zeros."""
        out = siphash(self.secret, checksums)
        out[out == ZERO] = 1
        out[checksums == np.uint64(zero)] = ZERO
        return out


def load(path: Path) -> Key:
    """Read a key from a file. Raises FleetError if there is no file, if it has no key, or if others can read it."""
    try:
        with path.open() as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(1000).strip()
    except FileNotFoundError:
        raise FleetError(
            f"there is no key at {path}: copy that of the fleet to it, or make the first with --new-key"
        ) from None
    except UnicodeDecodeError:
        text, mode = "", 0
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise FleetError(f"others may read {path}: chmod 600 it")
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != BYTES:
        raise FleetError(f"{path} is no key: {2 * BYTES} hexadecimal digits, as --new-key writes them")
    return Key(secret)


def make(path: Path) -> Key:
    """Make a new key, in a file that must not exist yet. Raises FleetError."""
    key = Key(secrets.token_bytes(BYTES))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise FleetError(f"{path} is there already, and recordings may have been made with it") from None
    with os.fdopen(fd, "w") as file:
        file.write(key.secret.hex() + "\n")
        file.flush()
        os.fsync(fd)
    return key


def siphash(secret: bytes, words: U64) -> U64:
    """SipHash-2-4 (Aumasson and Bernstein, 2012) of each word, as a message of eight bytes, lowest first."""
    k0, k1 = np.frombuffer(secret, "<u8")
    v = [
        np.full(len(words), k ^ np.uint64(c))
        for k, c in zip(
            (k0, k1, k0, k1),
            (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573),
            strict=True,
        )
    ]
    length = np.full(len(words), np.uint64(8 << 56))
    for message in (words.astype(np.uint64), length):
        v[3] ^= message
        _round(v)
        _round(v)
        v[0] ^= message
    v[2] ^= np.uint64(0xFF)
    for _ in range(4):
        _round(v)
    out: U64 = v[0] ^ v[1] ^ v[2] ^ v[3]
    return out


def _round(v: list[U64]) -> None:
    v[0] += v[1]
    v[1] = _rotated(v[1], 13) ^ v[0]
    v[0] = _rotated(v[0], 32)
    v[2] += v[3]
    v[3] = _rotated(v[3], 16) ^ v[2]
    v[0] += v[3]
    v[3] = _rotated(v[3], 21) ^ v[0]
    v[2] += v[1]
    v[1] = _rotated(v[1], 17) ^ v[2]
    v[2] = _rotated(v[2], 32)


def _rotated(x: U64, bits: int) -> U64:
    out: U64 = (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))
    return out
