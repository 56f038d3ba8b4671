"""Small forms of real applications, for `benchmarks.apps`: what holds the same data in several copies of a program.

Each builds some tens of MiB, says `ready`, waits for a line, works on the data for a second or two, says `done`, waits
for the end of its input, and ends. Scripts are sh's, and run in a directory of their own that `prepare` made.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


@dataclass(frozen=True)
class Application:
    """`explained`: why less than page-by-page merging could save is saved, where that is known."""

    name: str
    command: str
    needs: Sequence[str] = ()
    imports: Sequence[str] = ()
    prepare: str = ":"
    explained: str = ""

    def missing(self) -> str:
        """What it needs and is not installed, or nothing."""
        programs = [need for need in self.needs if not (shutil.which(need) or Path(need).exists())]
        return ", ".join(programs + [module for module in self.imports if not find_spec(module)])


TURNS = """
import sys
def turns(work):
    print("ready", flush=True)
    sys.stdin.readline()
    work()
    print("done", flush=True)
    sys.stdin.read()
"""


def python_script(name: str, script: str, *imports: str, explained: str = "") -> Application:
    """A program in Python, for which `turns` keeps to that."""
    prepare = f"cat >main.py <<'EOF'\n{TURNS}{script}\nEOF"
    return Application(name, "exec $PYTHON main.py", imports=imports, prepare=prepare, explained=explained)


PANDAS = """
import pandas as pd, numpy as np
rng = np.random.default_rng(1)
n = 400_000
df = pd.DataFrame({"k": rng.integers(0, 97, n), "x": rng.normal(size=n), "y": rng.normal(size=n)})
df["name"] = [f"customer {k}" for k in df.k]
def work():
    for i in range(5):
        part = df[df.k < 50 + i]
        part.sort_values("x").groupby("k").agg({"x": "mean", "y": "sum"})
        part.groupby("name").x.sum()
turns(work)
"""

PYARROW = """
import pyarrow as pa, pyarrow.compute as pc, numpy as np
pa.set_memory_pool(pa.POOL())
rng = np.random.default_rng(1)
n = 1_500_000
part = pa.table({"k": pa.array(rng.integers(0, 97, n)), "x": pa.array(rng.normal(size=n))})
table = part.sort_by("x")  # in memory of the pool
del part
def work():
    for i in range(6):
        table.filter(pc.greater(table["k"], i)).group_by("k").aggregate([("x", "mean")])
        table.sort_by("k")
turns(work)
"""

POLARS = """
import polars as pl
df = pl.select(pl.int_range(2_000_000).alias("i")).with_columns((pl.col("i") * 7919 % 997).alias("k"))
def work():
    for i in range(8):
        df.filter(pl.col("i") % (i + 2) == 0).group_by("k").agg(pl.col("i").sum())
        df.sort("k")
turns(work)
"""

SKLEARN = """
import numpy as np
from sklearn.ensemble import RandomForestClassifier
x = np.random.default_rng(1).normal(size=(4000, 20))
model = RandomForestClassifier(80, random_state=1, n_jobs=1).fit(x, x[:, 0] + 0.5 * x[:, 1] * x[:, 2] > 0)
def work():
    for _ in range(8):
        model.predict(x)
turns(work)
"""

OBJECTS = """
import json
rows = [{"id": i, "name": f"user {i}", "tags": [str(i % 7), str(i % 11)], "score": i / 7} for i in range(60_000)]
def work():
    for i in range(3):
        text = json.dumps(rows)
        again = json.loads(text)
        sorted(again, key=lambda r: r["score"] % (i + 2))
turns(work)
"""

FORKED = """
import json, os, signal
modules = {i: f"imported before the fork {i}" for i in range(100_000)}  # stays shared by fork
begin, end = os.pipe(), os.pipe()
for n in range(3):
    if os.fork() == 0:
        rows = [{"id": i, "name": f"user {i}", "score": i / 7} for i in range(50_000)]
        os.write(end[1], b"r")
        os.read(begin[0], 1)
        for _ in range(2):
            json.loads(json.dumps(rows))
        os.write(end[1], b"d")
        signal.pause()
def await_all():
    seen = b""
    while len(seen) < 3:
        seen += os.read(end[0], 3)
await_all()
def work():
    os.write(begin[1], b"xxx")
    await_all()
turns(work)
os.killpg(0, signal.SIGTERM)
"""

JOBLIB = """
import builtins
import time
import numpy as np
from joblib.externals.loky import get_reusable_executor
def hold(n):
    rows = [{"id": i, "name": f"user {i}", "score": i / 7} for i in range(40_000)]
    builtins.held = rows, np.random.default_rng(1).normal(size=1_000_000)
    time.sleep(0.5)  # so that each worker takes one
def sort(n):
    rows, array = builtins.held
    for k in range(3):
        sorted(rows, key=lambda row: row["score"] % (n + 2))
        np.sort(array + k)
pool = get_reusable_executor(max_workers=2, timeout=100)
def both(task):
    list(pool.map(task, range(2)))
both(hold)
turns(lambda: both(sort))
pool.shutdown()
"""

DJANGO = """cat >app.py <<'EOF'
import json
import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.template import Context, Engine
from django.urls import path

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], INSTALLED_APPS=[
    "django.contrib.auth", "django.contrib.contenttypes", "django.contrib.admin", "django.contrib.sessions",
    "django.contrib.messages",
], DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
application = get_wsgi_application()
template = Engine().from_string("{% for row in rows %}{{ row.name }} {{ row.score|floatformat:2 }}, {% endfor %}")
rows = []
def page(request):
    if not rows:
        rows.extend({"id": i, "name": f"user {i}", "score": i / 7} for i in range(40_000))
    return HttpResponse(template.render(Context({"rows": rows[:2000]})) + json.dumps(rows[:2000]))
urlpatterns = [path("", page)]
EOF
cat >ask.py <<'EOF'
import socket, sys
for _ in range(int(sys.argv[1])):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("s")
        s.sendall(b"GET / HTTP/1.0\\r\\nHost: a\\r\\n\\r\\n")
        while s.recv(1 << 16):
            pass
EOF"""

GUNICORN = """trap 'kill $pid' EXIT
$PYTHON -m gunicorn -w 3 -b unix:s app >log 2>&1 & pid=$!
until test -S s; do sleep 0.1; done
$PYTHON ask.py 30; echo ready; read line
$PYTHON ask.py 60; echo done; cat >/dev/null"""

NODE = """cat >main.js <<'EOF'
const rows = [];
for (let i = 0; i < 120000; i++) rows.push({ id: i, name: "user " + i, tags: [i % 7, i % 11], score: i / 7 });
process.stdin.once("data", () => {
    for (let k = 0; k < 3; k++) {
        const again = JSON.parse(JSON.stringify(rows));
        again.sort((a, b) => (a.score % (k + 2)) - (b.score % (k + 2)));
    }
    console.log("done");
    process.stdin.on("end", () => process.exit(0));
});
console.log("ready");
EOF"""

JAVA = """cat >Main.java <<'EOF'
import java.util.*;
public class Main {
    public static void main(String[] a) throws Exception {
        Map<Integer, String> live = new HashMap<>();
        byte[][] big = new byte[30][1 << 20];
        for (int i = 0; i < 150000; i++) live.put(i, "user " + i);
        Random r = new Random(7);
        for (byte[] b : big) r.nextBytes(b);
        System.gc();
        System.out.println("ready");
        System.in.read();
        long sum = 0;
        for (int k = 0; k < 60; k++) {
            List<String> l = new ArrayList<>();
            for (String s : live.values()) l.add(s + k);
            Collections.sort(l);
            sum += l.get(k).hashCode();
            sum += Arrays.hashCode(big[k % 30]);
        }
        System.out.println("done");
        while (System.in.read() >= 0);
    }
}
EOF
javac Main.java"""

RUBY = """cat >main.rb <<'EOF'
rows = (0...120_000).map { |i| { id: i, name: "user number #{i} of this application", score: i / 7.0 } }
big = (0...20).map { |i| (65 + i).chr * (1 << 20) }
$stdout.sync = true
puts "ready"
$stdin.gets
6.times { |k| rows.map { |r| r[:name] + k.to_s }.sort; rows.sort_by { |r| r[:score] % (k + 2) } }
puts "done"
$stdin.read
EOF"""

PHP = """cat >main.php <<'EOF'
<?php ini_set("memory_limit", -1);
$rows = [];
for ($i = 0; $i < 100000; $i++) $rows[] = ["id" => $i, "name" => "user $i", "score" => $i / 7];
echo "ready\\n";
fgets(STDIN);
for ($k = 0; $k < 4; $k++) {
    $again = json_decode(json_encode($rows), true);
    usort($again, fn($a, $b) => fmod($a["score"], $k + 2) <=> fmod($b["score"], $k + 2));
}
echo "done\\n";
stream_get_contents(STDIN);
EOF"""

REDIS = """trap 'kill $pid' EXIT
redis-server --port 0 --unixsocket $PWD/s --enable-debug-command yes --save '' --appendonly no >log 2>&1 & pid=$!
until redis-cli -s $PWD/s ping >/dev/null 2>&1; do sleep 0.05; done
i=0; while [ $i -lt 60000 ]; do
    echo "SET key$i value-of-the-key-$i-which-is-rather-long-and-then-some-more-of-it-to-make-it-longer-still-$i"
    i=$((i + 1))
done | redis-cli -s $PWD/s --pipe >/dev/null
redis-cli -s $PWD/s debug populate 20000 data 1000 >/dev/null 2>&1
echo ready; read line
redis-benchmark -s $PWD/s -n 100000 -c 10 -t set,get -r 20000 -d 200 -q >/dev/null
echo done; cat >/dev/null"""

ERLANG = """HOME=$PWD exec erl -noshell -eval '
L = [{I, integer_to_list(I), {I rem 7, I rem 11}} || I <- lists:seq(1, 250000)],
B = [binary:copy(<<(65 + I)>>, 1048576) || I <- lists:seq(1, 20)],
io:format("ready~n"), io:get_line(""),
[lists:sort(fun({_, A, _}, {_, C, _}) -> A =< C end, L) || _ <- lists:seq(1, 4)],
[erlang:md5(X) || X <- B], io:format("done~n"), io:get_line(""), halt(0).'"""

GO = """cat >main.go <<'EOF'
package main

IMPORT_C
import (
	"bufio"
	"fmt"
	"io"
	"math/rand"
	"os"
	"sort"
)

func main() {
	in := bufio.NewReader(os.Stdin)
	rows := map[int]string{}
	for i := 0; i < 150000; i++ {
		rows[i] = fmt.Sprint("user number ", i)
	}
	big := make([][]byte, 20)
	for i := range big {
		big[i] = make([]byte, 1<<20)
		rand.New(rand.NewSource(int64(i))).Read(big[i])
	}
	fmt.Println("ready")
	in.ReadString('\\n')
	for k := 0; k < 12; k++ {
		l := []string{}
		for i := 0; i < len(rows); i++ {
			l = append(l, rows[i]+"x")
		}
		sort.Strings(l)
	}
	fmt.Println("done", len(big))
	io.Copy(io.Discard, in)
}
EOF
export GOCACHE=$PWD/cache GOPATH=$PWD/path GOFLAGS=-mod=mod GO111MODULE=off
"""

BLOCKS = """cat >blocks.c <<'EOF'
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
enum { N = 60000 };
static char *block[N];
int main(void)
{
	unsigned r = 1;
	char line[80];
	for (int i = 0; i < N; i++) {
		size_t len = 100 + (r = r * 1103515245 + 12345) / 65536 % 1000;
		block[i] = malloc(len);
		for (size_t j = 0; j < len; j++)
			block[i][j] = (char)(i + j);
	}
	puts("ready");
	fflush(stdout);
	fgets(line, sizeof(line), stdin);
	for (int i = 0; i < 3000000; i++) {
		int at = (r = r * 1103515245 + 12345) / 65536 % 5000;
		size_t len = 100 + r / 65536 % 900;
		free(block[at]);
		block[at] = malloc(len);
		memset(block[at], i, len);
	}
	puts("done");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin))
		;
	return 0;
}
EOF
gcc -O2 blocks.c -o blocks """


def _allocator(name: str, library: str, link: str, explained: str = "") -> Application:
    needs = ["gcc", *([library] if library else [])]
    return Application(name, "exec ./blocks", needs=needs, prepare=BLOCKS + link, explained=explained)


NOT_LIBC = "small blocks of glibc's heap are taken by --memory all alone"
NOT_PRELOADED = "statically linked: no agent"

APPLICATIONS = [
    python_script("pandas worker", PANDAS, "pandas", "numpy"),
    *(
        python_script(f"pyarrow, {pool}", PYARROW.replace("POOL", f"{pool}_memory_pool"), "pyarrow", "numpy")
        for pool in ("mimalloc", "jemalloc", "system")
    ),
    python_script("polars", POLARS, "polars"),
    python_script("scikit-learn", SKLEARN, "sklearn", explained=NOT_LIBC),
    python_script("Python, JSON", OBJECTS),
    python_script("Python, forked workers", FORKED),
    python_script("joblib, loky workers", JOBLIB, "joblib", "numpy"),
    Application("Django, gunicorn", GUNICORN, imports=["django", "gunicorn"], prepare=DJANGO),
    Application("node", "exec node main.js", needs=["node"], prepare=NODE),
    *(
        Application(f"JVM, {gc}", f"exec java -Xmx200m -XX:+Use{gc}GC Main", needs=["javac"], prepare=JAVA)
        for gc in ("G1", "Parallel")
    ),
    Application("ruby", "exec ruby main.rb", needs=["ruby"], prepare=RUBY),
    Application("PHP", "exec php main.php", needs=["php"], prepare=PHP),
    Application("redis", REDIS, needs=["redis-server"]),
    Application("Erlang", ERLANG, needs=["erl"]),
    Application(
        "Go with cgo",
        "exec ./main",
        needs=["go", "gcc"],
        prepare=GO.replace("IMPORT_C", 'import "C"') + "CGO_ENABLED=1 go build -o main main.go; rm -rf cache path",
    ),
    Application(
        "Go, static",
        "exec ./main",
        needs=["go"],
        prepare=GO.replace("IMPORT_C", "") + "CGO_ENABLED=0 go build -o main main.go; rm -rf cache path",
        explained=NOT_PRELOADED,
    ),
    _allocator("C, mimalloc", f"{LIBRARIES}/libmimalloc.so.2", "-Wl,--no-as-needed -l:libmimalloc.so.2"),
    _allocator(
        "C, jemalloc static", f"{LIBRARIES}/libjemalloc.a", f"{LIBRARIES}/libjemalloc.a -lm -ldl -lstdc++ -pthread"
    ),
    _allocator(
        "C, tcmalloc", f"{LIBRARIES}/libtcmalloc_minimal.so.4", "-Wl,--no-as-needed -l:libtcmalloc_minimal.so.4"
    ),
    _allocator("C, glibc", "", "", NOT_LIBC),
]
