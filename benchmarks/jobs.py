"""Jobs for `benchmarks.overhead`: programs that work for some seconds and share nothing with anybody.

Scripts are sh's, and run in a directory of their own that `prepare` made.
"""

from __future__ import annotations

from benchmarks.applications import Application

JVM = """cat >Main.java <<'EOF'
import java.util.*;
public class Main {
    static final class Node { Node left, right; int value; }
    static Node tree(int depth) {
        Node n = new Node();
        n.value = depth;
        if (depth > 0) { n.left = tree(depth - 1); n.right = tree(depth - 1); }
        return n;
    }
    static int count(Node n) { return n.left == null ? 1 : 1 + count(n.left) + count(n.right); }
    public static void main(String[] a) {
        Node kept = tree(20);
        int sum = 0;
        for (int i = 0; i < 1600; i++) sum += count(tree(16));
        Map<Integer, String> map = new HashMap<>();
        for (int i = 0; i < 2_000_000; i++) map.put(i % 300_000, "user " + i);
        List<String> sorted = new ArrayList<>(map.values());
        Collections.sort(sorted);
        System.out.println(sum + count(kept) + sorted.get(5));
    }
}
EOF
javac Main.java"""

NODE = """cat >main.js <<'EOF'
const rows = [];
for (let i = 0; i < 150000; i++) rows.push({ id: i, name: "user " + i, tags: [i % 7, i % 11], score: i / 7 });
let sum = 0;
for (let k = 0; k < 6; k++) {
    const again = JSON.parse(JSON.stringify(rows));
    again.sort((a, b) => (a.score % (k + 2)) - (b.score % (k + 2)));
    sum += Buffer.alloc(8 << 20, k).reduce((a, b) => a + b);
}
console.log(sum);
EOF"""

PYTHON = """cat >main.py <<'EOF'
import json, pickle, random
random.seed(1)
rows = [{"id": i, "name": f"user {i}", "tags": [str(i % 7)], "score": random.random()} for i in range(60_000)]
def tree(depth):
    return (tree(depth - 1), tree(depth - 1)) if depth else (None, None)
for k in range(5):
    json.loads(json.dumps(rows))
    pickle.loads(pickle.dumps(rows))
    sorted(rows, key=lambda row: row["score"])
    {row["name"]: bytearray(500) for row in rows}
    for _ in range(4):
        tree(14)
EOF"""

REDIS = """redis-server --port 0 --unixsocket $PWD/s --save '' --appendonly no >log 2>&1 & pid=$!
while ! redis-cli -s $PWD/s ping >/dev/null 2>&1; do sleep 0.1; done
redis-benchmark -s $PWD/s -n 150000 -c 20 -t set,get,lpush -r 100000 -d 200 -q >/dev/null
kill $pid; wait $pid"""

AS_POSTGRES = "setpriv --reuid postgres --regid postgres --clear-groups"
PG = "/usr/lib/postgresql/15/bin"
POSTGRES = f"chown postgres . && {AS_POSTGRES} {PG}/initdb -D data >/dev/null"
PGBENCH = f"""exec {AS_POSTGRES} sh -c '
{PG}/postgres -D data -k $PWD -h "" >log 2>&1 & pid=$!
while ! {PG}/pg_isready -qh $PWD; do sleep 0.1; done
pgbench -h $PWD -iqs 10 postgres 2>/dev/null
pgbench -h $PWD -c 4 -t 1500 postgres >/dev/null 2>&1
kill -INT $pid; wait $pid'"""

GCC = """for n in $(seq 10); do {
    printf '#include <stdio.h>\\n#include <stdlib.h>\\n#include <string.h>\\n'
    for f in $(seq 60); do
        echo "int f${n}_$f(int x, const char *s) { char b[99]; int r = $f;"
        echo 'for (int i = 0; i < x; i++) { r += s[i] * i; snprintf(b, 99, "%d %s", r, s); r ^= strlen(b); }'
        echo 'switch (r % 7) { case 1: return abs(r); case 2: return atoi(s); default: return r; } }'
    done
} >f$n.c; done"""

JOBS = [
    Application("JVM", "exec java -Xmx400m Main", needs=["javac"], prepare=JVM),
    Application("node", "exec node main.js", needs=["node"], prepare=NODE),
    Application("Python", "exec $PYTHON main.py", prepare=PYTHON),
    Application("redis-benchmark", REDIS, needs=["redis-server"]),
    Application("pgbench", PGBENCH, needs=[f"{PG}/postgres", "pgbench"], prepare=POSTGRES),
    Application("gcc", "ls f*.c | xargs -n1 -P2 gcc -O2 -c", needs=["gcc"], prepare=GCC),
]
