"""The recipes in docs/recipes.md do what they say: the same answers, and memory saved."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from samepage import agent
from samepage.service.scanner import Scanner
from tests.service.serving import serving

pytestmark = pytest.mark.skipif(
    not agent.library_path().exists(), reason=f"needs the agent, and there is no {agent.library_path()}"
)

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
WORKERS = 4
WEIGHTS = 64 * MIB
ROWS = 200

APP = """
import numpy as np
weights = np.load("weights.npy")

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [repr(float(weights[int(environ["QUERY_STRING"])] @ weights[0])).encode()]
"""


def recipes() -> dict[str, str]:
    """The programs in the document, by name."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    return dict(re.findall(r"<!-- (\S+\.py) -->\n```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the recipes, the weights and the application."""
    for name, program in recipes().items():
        (tmp_path / name).write_text(program)
    rows = np.random.default_rng(16).standard_normal((WEIGHTS // 4 // 1024, 1024), np.float32)
    np.save(tmp_path / "weights.npy", rows)
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
def scanner(folder: Path) -> Iterator[Scanner]:
    with serving(str(folder / "socket")) as scanner:
        yield scanner


def environment(folder: Path, merged: bool) -> dict[str, str]:
    """Without `merged`, the service that `attach` is to join never comes."""
    found = {k: v for k, v in os.environ.items() if not k.startswith(("SAMEPAGE_", "LD_PRELOAD"))}
    path = os.pathsep.join(p for p in sys.path if p)
    return found | {
        "PYTHONPATH": path,
        "SAMEPAGE_SOCKET": str(folder / ("socket" if merged else "nobody")),
        "OPENBLAS_NUM_THREADS": "1",
    }


def saved(scanner: Scanner) -> int:
    """Bytes, when what all workers but one have of the weights is saved, or after a minute."""
    best, deadline = 0, time.monotonic() + 60
    while best < 0.95 * (WORKERS - 1) * WEIGHTS and time.monotonic() < deadline:
        time.sleep(0.1)
        best = max(best, scanner.counters()["bytes_saved"])
    return best


@contextlib.contextmanager
def running(folder: Path, merged: bool, *command: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment(folder, merged),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
            process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0


def printed(folder: Path, scanner: Scanner | None, *command: str) -> tuple[str, int]:
    """What a program answers on its first line, and what is saved while it waits for its input to end."""
    with running(folder, scanner is not None, *command) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        return line, saved(scanner) if scanner else 0


def holds(folder: Path, scanner: Scanner, *command: str) -> None:
    """The same answers as without a service, and the weights of all workers but one saved."""
    bare, _ = printed(folder, None, *command)
    line, amount = printed(folder, scanner, *command)
    assert line == bare
    assert line.count(",") == ROWS - 1
    print(f"saved {amount / MIB:.0f} MiB")
    assert amount > 0.9 * (WORKERS - 1) * WEIGHTS


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_the_workers_of_a_pool_share_what_they_load(folder: Path, scanner: Scanner, method: str) -> None:
    holds(folder, scanner, "pool.py", method)


def test_the_workers_of_joblib_share_what_they_load(folder: Path, scanner: Scanner) -> None:
    pytest.importorskip("joblib")
    holds(folder, scanner, "parallel.py")


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_actors_of_ray_share_what_they_load(folder: Path, scanner: Scanner) -> None:
    pytest.importorskip("ray")
    holds(folder, scanner, "actors.py")


@pytest.mark.long
def test_the_workers_of_onnxruntime_share_their_model(folder: Path, scanner: Scanner) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weights = onnx.numpy_helper.from_array(np.load(folder / "weights.npy"), "weights")
    first = onnx.numpy_helper.from_array(np.load(folder / "weights.npy")[0], "first")
    nodes = [
        onnx.helper.make_node("Gather", ["weights", "row"], ["one"]),
        onnx.helper.make_node("MatMul", ["one", "first"], ["answer"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "rows",
        [onnx.helper.make_tensor_value_info("row", onnx.TensorProto.INT64, [1])],
        [onnx.helper.make_tensor_value_info("answer", onnx.TensorProto.FLOAT, [1])],
        [weights, first],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    holds(folder, scanner, "sessions.py")


def answers(folder: Path, merged: bool, recipe: str, scanner: Scanner | None = None) -> tuple[list[bytes], int]:
    """What gunicorn with this configuration answers, and what is saved meanwhile."""
    socket = folder / f"port{merged}"
    command = ("-m", "gunicorn", "-c", recipe, "--bind", "127.0.0.1:0", "--log-file", str(socket), "app:app")
    with running(folder, merged, *command) as process:
        address = listening(socket)
        found = [urllib.request.urlopen(f"{address}/?{row}", timeout=30).read() for row in range(0, ROWS, 5)]
        amount = saved(scanner) if scanner else 0
        found += [urllib.request.urlopen(f"{address}/?{row}", timeout=30).read() for row in range(1, ROWS, 5)]
        process.send_signal(signal.SIGTERM)
    return found, amount


def listening(log: Path) -> str:
    """Where gunicorn says that it listens."""
    for _ in range(600):
        if log.exists() and (said := re.search(r"Listening at: (\S+)", log.read_text())):
            return said[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.mark.parametrize("recipe", ["gunicorn-hook.conf.py", "gunicorn-all.conf.py"])
def test_the_workers_of_gunicorn_share_what_they_load(folder: Path, scanner: Scanner, recipe: str) -> None:
    pytest.importorskip("gunicorn")
    bare, _ = answers(folder, False, recipe)
    merged, amount = answers(folder, True, recipe, scanner)
    assert merged == bare
    print(f"saved {amount / MIB:.0f} MiB")
    assert amount > 0.9 * (WORKERS - 1) * WEIGHTS
