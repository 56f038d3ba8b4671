"""Programs that know nothing of samepage run the same under it: same exit status, output and files."""

from __future__ import annotations

import os

import pytest

from tests.compat.programs import FULL_RATE, Program, Runs

LINES = "awk 'BEGIN { srand(1); for (i = 0; i < 250000; i++) printf \"%09d %016d\\n\", rand() * 1e9, i }'"
"""7 MB without two equal lines, the same each time."""

C_PROGRAM = """cat >program.c <<'EOF'
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static unsigned *big, len = 4u << 20;
unsigned work(unsigned start)
{
	unsigned sum = 0;
	for (unsigned i = start; i < len; i++)
		sum = sum * 31 + big[i];
	return sum;
}
int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 60;
	big = malloc(len * 4);
	for (unsigned i = 0; i < len; i++)
		big[i] = i / 1024 % 512;
	for (int i = 0; i < rounds; i++) {
		unsigned sum = work(0);
		if (i % 10 == 0)
			printf("%u\\n", sum);
		big[i * 4096] += sum;
	}
	big = realloc(big, 8 * len);
	memset(big + len, 7, 4 * len);
	printf("%u %u\\n", work(0), big[2 * len - 1]);
	free(big);
	return 3;
}
EOF
gcc -g -O1 -fdebug-prefix-map=$PWD=. program.c -o program
"""

NUMPY = """cat >arrays.py <<'EOF'
import sys, threading
import numpy as np

tables = [np.random.default_rng(7).random(1 << 20) for _ in range(3)]

def work(seed):
    mine = np.random.default_rng(seed).random(1 << 20)
    for i in range(20):
        mine = np.sqrt(mine * tables[i % 3])
        tables[seed % 3][seed * 512 + i] = 0.5
    return float(mine.sum())

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print([work(seed) for seed in range(3)], [float(table.sum()) for table in tables])
sys.exit(7)
EOF
"""

POOLS = """cat >pools.py <<'EOF'
import multiprocessing, sys
import numpy as np

def work(seed):
    table = np.random.default_rng(7).random(1 << 20)
    mine = np.random.default_rng(seed).random(1 << 20)
    for _ in range(20):
        mine = np.sqrt(mine * table)
    return float(mine.sum()), float(table.sum())

if __name__ == "__main__":
    inherited = np.ones(1 << 20)
    with multiprocessing.get_context(sys.argv[1]).Pool(3) as pool:
        for pair in pool.map(work, range(9), chunksize=1):
            print(pair, inherited.sum())
EOF
"""

ASYNCIO = """cat >tasks.py <<'EOF'
import asyncio, sys

async def child(n):
    code = f"import sys; data = sys.stdin.buffer.read(); print({n}, len(data), sum(data)); sys.exit({n})"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=-1, stdout=-1)
    out, _ = await process.communicate(bytes([n]) * (8 << 20))
    return out, process.returncode

async def main():
    for answer in await asyncio.gather(*(child(n) for n in range(4)), asyncio.to_thread(bytearray, 8 << 20)):
        print(answer[:2])

asyncio.run(main())
EOF
"""

NODE = """cat >buffers.js <<'EOF'
const { Worker, isMainThread, parentPort, workerData } = require("worker_threads");
const { createHash } = require("crypto");
function work(seed) {
  const buffers = [];
  for (let i = 0; i < 6; i++) buffers.push(Buffer.alloc(8 << 20, `pattern ${i % 3} `));
  const hash = createHash("sha256");
  for (let round = 0; round < 6; round++)
    for (const b of buffers) { b.writeUInt32LE(seed + round, 65536 * round); hash.update(b); }
  return hash.digest("hex");
}
if (isMainThread) {
  for (const seed of [1, 2])
    new Worker(__filename, { workerData: seed }).on("message", (m) => { results[seed] = m; });
  const results = [work(0)];
  process.on("exit", () => { console.log(results); process.exitCode = 6; });
} else parentPort.postMessage(work(workerData));
EOF
"""

JAVA = """cat >Main.java <<'EOF'
import java.nio.ByteBuffer;
import java.util.*;
import java.util.stream.*;
public class Main {
    public static void main(String[] args) throws Exception {
        List<ByteBuffer> buffers = new ArrayList<>();
        for (int i = 0; i < 4; i++) {
            ByteBuffer b = ByteBuffer.allocateDirect(8 << 20);
            for (int j = 0; j < b.capacity(); j += 8) b.putLong(j, j / 4096 % 64);
            buffers.add(b);
        }
        long sum = 0;
        for (int round = 0; round < 10; round++)
            for (ByteBuffer b : buffers) {
                b.putLong(4096 * round, sum);
                for (int j = 0; j < b.capacity(); j += 64) sum = sum * 31 + b.getLong(j);
            }
        System.out.println(sum + " " + IntStream.range(0, 1000000).parallel().mapToLong(i -> i * 3L).sum());
        System.exit(9);
    }
}
EOF
"""

SECCOMP = """cat >filter.c <<'EOF'
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#define ALLOW(nr) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
int main(void)
{
	unsigned len = 4u << 20, sum = 0, *big = malloc(4 * len);
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		ALLOW(SYS_write), ALLOW(SYS_newfstatat), ALLOW(SYS_exit_group), ALLOW(SYS_brk),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
	};
	struct sock_fprog filter = {sizeof(code) / sizeof(code[0]), code};
	for (unsigned i = 0; i < len; i++)
		big[i] = i / 1024 % 64;
	usleep(700000);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
		return 1;
	for (int round = 0; round < 50; round++)
		for (unsigned i = 0; i < len; i++)
			sum = sum * 31 + (big[i] += i % 4096 ? 0 : round);
	printf("%u\\n", sum);
	return 5;
}
EOF
gcc -O1 filter.c -o filter
"""

LEADERS = """cat >leaders.c <<'EOF'
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
static void *in_thread(void *leave)
{
	int status;
	if (!fork()) {
		memset(malloc(4 << 20), 1, 4 << 20);
		printf("a child that leads its process from a thread's function\\n"); /* written when the process ends */
		if (*(char *)leave)
			pthread_exit(NULL);
		return NULL;
	}
	wait(&status);
	printf("%d\\n", status);
	return NULL;
}
static void *outlive(void *leader)
{
	pthread_join(*(pthread_t *)leader, NULL);
	printf("the last thread\\n");
	return NULL;
}
int main(void)
{
	static pthread_t thread, leader;
	memset(malloc(4 << 20), 1, 4 << 20);
	usleep(300000);
	for (int i = 0; i < 2; i++) {
		pthread_create(&thread, NULL, in_thread, i ? "y" : "");
		pthread_join(thread, NULL);
	}
	leader = pthread_self();
	pthread_create(&thread, NULL, outlive, &leader);
	pthread_cancel(leader);
	pause();
}
EOF
gcc -pthread leaders.c -o leaders
"""

JEMALLOC = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
TCMALLOC = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"

PROGRAMS = [
    Program(
        "gcc",
        needs=["gcc"],
        prepare="""awk 'BEGIN { for (i = 0; i < 150; i++) printf \
            "int f%d(int *a, int n) { int s = %d; for (int i = 0; i < n; i++) s += a[i] * %d; return s; }\\n", \
            i, i, i % 17; print "int main(void) { int a[3] = {1, 2, 3}; return f5(a, 3); }" }' >big.c""",
        command="gcc -O2 -Wall -pipe big.c -o big && ./big",
    ),
    Program(
        "git-gc",
        needs=["git"],
        prepare=f"""git init -q . && {LINES} | split -l 5000 - f && git add .
            export GIT_AUTHOR_DATE='2026-01-01T00:00:00Z' GIT_COMMITTER_DATE='2026-01-01T00:00:00Z'
            for i in 1 2 3; do
                sed -i "s/^$i/x/" f*; git add .; git -c user.name=a -c user.email=a@b commit -qm $i; done""",
        command="git gc -q --prune=now && git fsck --full && git count-objects -v | grep -v size && git log --stat",
        # Which object becomes whose delta depends on which thread came first; the index has inode numbers.
        forget=r"^\.git/(index$|objects/)",
        joins=1,
    ),
    Program(
        "xz",
        needs=["xz"],
        prepare=f"{LINES} >lines",
        command="xz -T2 -k --block-size=2MiB lines && xz -t lines.xz && xz -dc -T2 lines.xz | cmp - lines",
        joins=1,
        merges=True,
    ),
    Program(
        "sort",
        needs=["sort"],
        prepare=f"{LINES} >lines",
        command="sort -S 200M --parallel=2 lines >sorted && sort -S 8M -r lines | tail -3; sort -c lines",
        joins=1,
    ),
    Program(
        "perl",
        needs=["perl"],
        command="""exec perl -e 'my @s = map { chr(65 + $_ % 4) x (8 << 20) } 0 .. 5; my $sum = 0;
            for my $round (1 .. 6) { for my $s (@s) { substr($s, $round * 4096, 9) = "x$round" . "-" x 6;
                $s .= "end" x 1000; $sum += unpack("%32C*", $s); } }
            my $pid = fork; if (!$pid) { substr($s[0], 5, 3) = "abc"; exit unpack("%8C*", $s[0]); }
            waitpid $pid, 0; print "$sum $?\\n"; exit 4'""",
        joins=1,
        merges=True,
    ),
    Program(
        "sqlite3-cli",
        needs=["sqlite3"],
        command="""sqlite3 :memory: "ATTACH 'file:/big?vfs=memdb' AS big; CREATE TABLE t(a INTEGER PRIMARY KEY, b);
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000)
                INSERT INTO t SELECT i, zeroblob(2000) || i FROM n;
            CREATE TABLE big.t AS SELECT * FROM t; UPDATE big.t SET b = b || 'x' WHERE a % 3 = 0;
            SELECT sum(a), sum(length(b)) FROM big.t; PRAGMA big.page_count; PRAGMA big.integrity_check;
            SELECT count(*) FROM t NATURAL JOIN big.t; SELECT nonsense;" """,
        joins=1,
        merges=True,
    ),
    Program(
        "sqlite3-module",
        command="""$PYTHON -c '
import sqlite3
source = sqlite3.connect(":memory:")
source.execute("CREATE TABLE t(a, b)")
source.executemany("INSERT INTO t VALUES (?, ?)", ((i, bytes(1500) + b"%d" % i) for i in range(20000)))
source.commit()
image = source.serialize()
copy = sqlite3.connect(":memory:")
copy.deserialize(image)
copy.execute("UPDATE t SET b = zeroblob(3000) WHERE a % 2")
print(len(image), copy.execute("SELECT sum(length(b)), sum(a) FROM t").fetchall())
print(copy.execute("PRAGMA integrity_check").fetchall(), sum(image) == sum(source.serialize()))
'""",
        joins=1,
        merges=True,
    ),
    Program("numpy-threads", prepare=NUMPY, command="$PYTHON arrays.py", joins=1, merges=True),
    Program("pool-fork", prepare=POOLS, command="$PYTHON pools.py fork", joins=4, merges=True),
    Program("pool-spawn", prepare=POOLS, command="$PYTHON pools.py spawn", joins=4, merges=True),
    Program("pool-forkserver", prepare=POOLS, command="$PYTHON pools.py forkserver", joins=4, merges=True),
    Program("asyncio", prepare=ASYNCIO, command="$PYTHON tasks.py", joins=1),
    Program("node", needs=["node"], prepare=NODE, command="node buffers.js", joins=1, merges=True),
    Program(
        "java", needs=["javac", "java"], prepare=JAVA, command="javac Main.java && java Main", joins=1, merges=True
    ),
    Program("java-version", needs=["java"], command="java -version"),
    Program(
        "openssl-speed",
        needs=["openssl"],
        command="openssl speed -seconds 1 -bytes 4000000 -multi 2 sha256",
        varies=r"\s+[\d.]+k|^(Got|Forked|\+).*|\d+ sha256's in .*",
        joins=1,
    ),
    Program(
        "tar",
        needs=["tar", "xz"],
        prepare=f"mkdir tree out && {LINES} | split -l 20000 - tree/f && ln -s faa tree/link",
        command="""tar --sort=name --mtime=@0 -cf - tree | xz -T2 -1 >tree.tar.xz && tar -xf tree.tar.xz -C out &&
            diff -r tree out/tree && tar -tvf tree.tar.xz --exclude=x""",
        varies=r" \S+/\S+ +\d+ 1970",
        joins=1,
    ),
    Program(
        "rsync",
        needs=["rsync"],
        prepare=f"mkdir tree && {LINES} | split -l 30000 - tree/f && cp -r tree copy && sed -i s/^0/x/ copy/f*",
        command="rsync -ai --no-times --checksum --no-whole-file --block-size=4096 tree/ copy && diff -r tree copy",
    ),
    Program("c-program", needs=["gcc"], prepare=C_PROGRAM, command="./program 200", joins=1, merges=True),
    Program(
        "gdb",
        needs=["gdb", "gcc"],
        prepare=C_PROGRAM,
        command="""gdb -nx -batch -ex 'set print thread-events off' -ex 'set debuginfod enabled off' \
            -ex 'break work if big[0] > 0' -ex run -ex 'delete' -ex 'print big[5000]' -ex 'print work(4000000)' \
            -ex 'set var big[9] = 8' -ex continue -ex 'print $_exitcode' ./program""",
        # That it says which thread is at a breakpoint, is one of the ways to see that there is a second one.
        varies=r'0x[0-9a-f]+|process \d+|Thread 1 "program" hit |\[Thread debugging.*\n|Using host libthread_db.*\n',
    ),
    Program(
        "gdb-attach",
        needs=["gdb", "gcc"],
        prepare=C_PROGRAM,
        command="""./program 300 & sleep 0.5
            gdb -nx -batch -ex 'set debuginfod enabled off' -ex 'print len' -ex 'print big[4096]' -p $! >gdb.out 2>&1
            grep '^.[12] =' gdb.out; wait $!""",
        forget="gdb.out",
        varies=r"^\$2 = .*",
        joins=1,
    ),
    Program(
        "strace",
        needs=["strace", "gcc"],
        prepare=C_PROGRAM,
        command="strace -f -o log sh -c './program 30; ./program 30 | tail -1; exit 5'",
        forget="log",
        joins=1,
    ),
    Program(
        "valgrind",
        needs=["valgrind", "gcc"],
        prepare=C_PROGRAM,
        command="valgrind -q --error-exitcode=99 ./program 2",
    ),
    Program("leaders", needs=["gcc"], prepare=LEADERS, command="./leaders", joins=1),
    Program("seccomp", needs=["gcc"], prepare=SECCOMP, command="./filter", joins=1, merges=True),
    Program(
        "unshare",
        needs=["unshare", "gcc"],
        prepare=C_PROGRAM,
        command="unshare -Ur id -u && unshare -Urpf --mount-proc sh -c 'echo $$; ./program 30'",
    ),
    Program(
        "bubblewrap",
        needs=["bwrap", "gcc"],
        prepare=C_PROGRAM,
        command="bwrap --ro-bind / / --dev /dev --proc /proc --unshare-all --die-with-parent ./program 200",
    ),
    Program(
        "tmux",
        needs=["tmux", "gcc"],
        prepare=C_PROGRAM,
        command="""tmux -S socket -f /dev/null new-session -d \
            './program 100 >out; echo $? >>out; tmux -S socket wait -S end'
            tmux -S socket wait end; cat out; tmux -S socket kill-server 2>/dev/null; true""",
        forget="socket",
        joins=1,
    ),
    Program(
        "jemalloc",
        needs=[JEMALLOC],
        prepare=NUMPY,
        command=f"LD_PRELOAD=$LD_PRELOAD:{JEMALLOC} $PYTHON arrays.py",
        joins=1,
        merges=True,
    ),
    Program(
        "jemalloc-first",
        needs=[JEMALLOC],
        prepare=NUMPY,
        command=f"LD_PRELOAD={JEMALLOC}:$LD_PRELOAD $PYTHON arrays.py",
    ),
    Program(
        "tcmalloc",
        needs=[TCMALLOC],
        prepare=NUMPY,
        command=f"LD_PRELOAD=$LD_PRELOAD:{TCMALLOC} $PYTHON arrays.py",
        joins=1,
        merges=True,
    ),
    Program(
        "tcmalloc-first",
        needs=[TCMALLOC],
        prepare=NUMPY,
        command=f"LD_PRELOAD={TCMALLOC}:$LD_PRELOAD $PYTHON arrays.py",
    ),
]

every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)


@pytest.mark.long
@every_program
def test_a_program_runs_the_same(runs: Runs, program: Program):
    outcome, _ = runs.merged(program)
    assert outcome == runs.bare(program)


@pytest.mark.long
@every_program
def test_a_program_runs_the_same_while_merging_never_pauses(runs: Runs, program: Program):
    outcome, report = runs.merged(program, FULL_RATE)
    assert outcome == runs.bare(program)
    assert report.joined >= program.joins, report


@every_program
def test_two_that_share_pages_run_the_same(runs: Runs, program: Program):
    outcomes, report = runs.merged_copies(program, 2, FULL_RATE)
    assert outcomes == [runs.bare(program)] * 2
    assert report.joined >= 2 * program.joins, report
    if program.merges:
        assert report.bytes_saved_peak > 0, report


def test_a_static_program_is_left_alone(runs: Runs):
    program = Program(
        "static", needs=["gcc"], prepare=C_PROGRAM + "gcc -static program.c -o static", command="exec ./static 30"
    )
    outcome, report = runs.merged(program, FULL_RATE)
    assert outcome == runs.bare(program)
    assert report.joined == 0
    assert report.line.startswith("samepage: nothing was saved")


def test_a_32_bit_program_only_hears_of_it_from_the_loader(runs: Runs):
    program = Program(
        "32-bit",
        needs=["gcc", "ld", "/lib/ld-linux.so.2", "/lib32/libc.so.6"],
        prepare="""echo 'int puts(const char *); void exit(int); void _start(void) { puts("32 bits"); exit(4); }' >p.c
            gcc -m32 -fno-pie -fno-stack-protector -mstackrealign -c p.c
            ld -m elf_i386 -dynamic-linker /lib/ld-linux.so.2 p.o /lib32/libc.so.6 -o p""",
        command="exec ./p",
    )
    outcome, report = runs.merged(program, FULL_RATE)
    bare = runs.bare(program)
    assert (outcome.status, outcome.output, outcome.files) == (bare.status, bare.output, bare.files)
    assert bare.output == "32 bits\n"
    assert "wrong ELF class" in outcome.errors
    assert report.joined == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a set-user-ID program")
def test_a_set_user_id_program_is_left_alone(runs: Runs):
    program = Program(
        "setuid",
        needs=["gcc", "setpriv"],
        prepare=C_PROGRAM + "chmod u+s program",
        command="chmod 755 . && exec setpriv --reuid 65534 --regid 65534 --clear-groups ./program 30",
    )
    outcome, report = runs.merged(program, FULL_RATE)
    assert outcome == runs.bare(program)
    assert outcome.status == 3
    assert report.joined == 0
