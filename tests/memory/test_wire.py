"""The wire: equal to the C header, and strict with whatever a peer sends."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage import memory
from samepage.memory import wire
from samepage.memory.wire import WireError

HEADER = Path(__file__).parents[2] / "src" / "samepage" / "agent" / "base" / "wire.h"


Layout = dict[str, dict[str, int]]
Pair = tuple[socket.socket, socket.socket]


def names(dtype: np.dtype[np.void]) -> tuple[str, ...]:
    assert dtype.names is not None
    return dtype.names


def offset(dtype: np.dtype[np.void], field: str) -> int:
    assert dtype.fields is not None
    return dtype.fields[field][1]


@pytest.fixture
def pair() -> Iterator[Pair]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    a.settimeout(5)
    b.settimeout(5)
    yield a, b
    a.close()
    b.close()


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def c_layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """What the C compiler makes of wire.h: `{struct: {"": size, field: offset}}`, and the constants."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", f'#include "{HEADER}"', 'int main(void) { printf("{");']
    for name, dtype in wire.STRUCTS.items():
        lines.append(f'printf("\\"{name}\\": {{\\"\\": %zu", sizeof(struct {name}));')
        lines += [f'printf(", \\"{f}\\": %zu", offsetof(struct {name}, {f}));' for f in names(dtype)]
        lines.append('printf("}, ");')
    constants = sorted(set(re.findall(r"\b(SP_[A-Z_0-9]+)\b(?=\s*=| [0-9(U])", HEADER.read_text())))
    lines.append('printf("\\"constants\\": {\\"\\": 0");')
    lines += [f'printf(", \\"{c}\\": %llu", (unsigned long long){c});' for c in constants]
    lines.append('printf("}}"); }')
    folder = tmp_path_factory.mktemp("layout")
    (folder / "layout.c").write_text("\n".join(lines))
    subprocess.run(["cc", "-Wall", "-Werror", "-o", folder / "layout", folder / "layout.c"], check=True)
    layout: Layout = json.loads(subprocess.check_output([folder / "layout"]))
    return layout


@pytest.mark.parametrize("name", wire.STRUCTS)
def test_each_struct_has_the_layout_of_the_c_header(name: str, c_layout: Layout) -> None:
    dtype = wire.STRUCTS[name]
    ours = {"": dtype.itemsize} | {f: offset(dtype, f) for f in names(dtype)}
    assert ours == c_layout[name]


def test_no_struct_of_the_c_header_is_missing() -> None:
    assert set(re.findall(r"^struct (sp_\w+) \{", HEADER.read_text(), re.M)) == set(wire.STRUCTS)


def test_no_field_of_the_c_header_is_missing() -> None:
    for name, body in re.findall(r"^struct (sp_\w+) \{(.*?)^\};", HEADER.read_text(), re.M | re.S):
        fields = re.findall(r"^\t(?:struct )?\w+ (\w+)(?:\[\w+\])?;", body, re.M)
        assert tuple(fields) == wire.STRUCTS[name].names


def test_every_constant_equals_the_c_header(c_layout: Layout) -> None:
    ours = {"SP_MAGIC": wire.MAGIC, "SP_VERSION": wire.VERSION, "SP_MSG_MAX": wire.MSG_MAX}
    ours |= {"SP_STALLS": len(memory.STALLS_US) + 1}
    ours |= {"SP_KEY_SIZE": wire.KEY_SIZE, "SP_PROOF_SIZE": wire.PROOF_SIZE}
    ours |= {"SP_ZERO_PAGE": memory.ZERO_PAGE, "SP_VPN_END": memory.VPN_END, "SP_AREAS_CHANGED": memory.AREAS_CHANGED}
    ours |= {f"SP_WELCOME_{flag.name}": int(flag) for flag in wire.Flags}
    ours |= {f"SP_{op.name}": int(op) for op in wire.Op}
    ours |= {f"SP_SCAN_{flag.name}": int(flag) for flag in memory.ScanFlag}
    ours |= {f"SP_SWAP_{swap.name}": int(swap) for swap in wire.Swap}
    assert ours | {"": 0} == c_layout["constants"]


def test_stalls_are_counted_by_the_times_of_the_c_header() -> None:
    (times,) = re.findall(r"#define SP_STALLS_US \{(.*?)\}", HEADER.read_text())
    assert tuple(map(int, times.split(","))) == memory.STALLS_US


def test_a_packet_arrives_as_it_was_sent(pair: Pair) -> None:
    wire.send(pair[0], wire.Op.SCAN, 7, wire.pack(wire.SCAN, 5, 100, 900, 1, 0))
    packet = wire.recv(pair[1])
    assert (packet.op, packet.seq, packet.error, packet.fd) == (wire.Op.SCAN, 7, 0, -1)
    assert packet.reader().one(wire.SCAN) == {"vpn": 5, "budget": 100, "end": 900, "flags": 1, "pad": 0}


def test_a_descriptor_rides_on_its_packet_and_is_closed_on_exec(pair: Pair) -> None:
    fd = os.memfd_create("x")
    wire.send(pair[0], wire.Op.MERGE, 1, fd=fd)
    packet = wire.recv(pair[1])
    assert os.fstat(packet.fd).st_ino == os.fstat(fd).st_ino
    assert not os.get_inheritable(packet.fd)
    packet.close()
    assert packet.fd == -1
    os.close(fd)


def test_the_largest_packet_fits_and_one_byte_more_does_not(pair: Pair) -> None:
    wire.send(pair[0], wire.Op.SCAN, 1, b"x" * wire.BODY_MAX)
    assert len(wire.recv(pair[1]).body) == wire.BODY_MAX
    with pytest.raises(WireError, match="fit"):
        wire.send(pair[0], wire.Op.SCAN, 1, b"x" * (wire.BODY_MAX + 1))


def test_an_oversize_packet_is_refused(pair: Pair) -> None:
    pair[0].send(b"x" * (wire.MSG_MAX + 1))
    with pytest.raises(WireError, match="more than"):
        wire.recv(pair[1])


@pytest.mark.parametrize("data", [b"x", b"x" * 15, wire.pack(wire.HDR, 1, 1, 0, 5), wire.encode(1, 1, b"abc")[:-1]])
def test_a_packet_whose_length_is_wrong_is_refused(pair: Pair, data: bytes) -> None:
    pair[0].send(data)
    with pytest.raises(WireError):
        wire.recv(pair[1])


def test_two_descriptors_are_refused_and_neither_stays_open(pair: Pair) -> None:
    ends = os.pipe()
    before = open_fds()
    socket.send_fds(pair[0], [wire.encode(1, 1)], list(ends))
    with pytest.raises(WireError, match="descriptor"):
        wire.recv(pair[1])
    assert open_fds() == before
    for fd in ends:
        os.close(fd)


def test_the_descriptor_of_a_refused_packet_does_not_stay_open(pair: Pair) -> None:
    fd = os.memfd_create("x")
    before = open_fds()
    socket.send_fds(pair[0], [b"too short"], [fd])
    with pytest.raises(WireError):
        wire.recv(pair[1])
    assert open_fds() == before
    os.close(fd)


def test_the_end_of_the_peer_is_told_from_a_bad_packet(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(wire.Disconnected):
        wire.recv(pair[1])


def test_a_reader_refuses_a_body_too_short_or_too_long() -> None:
    body = memoryview(bytes(wire.DONE.itemsize + 3))
    reader = wire.Reader(body)
    reader.one(wire.DONE)
    with pytest.raises(WireError, match="few"):
        reader.take(np.uint64, 1)
    with pytest.raises(WireError, match="many"):
        reader.end()
    with pytest.raises(WireError, match="many"):
        reader.rest(memory.AREA)
