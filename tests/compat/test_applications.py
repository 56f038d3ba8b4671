"""Real applications, several copies of each at once under one `samepage run`: same exit status, output and files.

Allocators that bring their own arenas, virtual machines, garbage collectors, databases and a browser are here because
each does something to memory that the programs of `test_programs.py` do not.
"""

from __future__ import annotations

import pytest

from tests.compat.programs import FULL_RATE, Program, Runs

COPIES = 3

ALLOCATOR = """cat >blocks.c <<'EOF'
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
enum { N = 400, ROUNDS = 4000 };
static void *work(void *seed)
{
	unsigned char *p[N] = {0};
	size_t len[N] = {0}, sum = 0;
	unsigned r = (unsigned)(size_t)seed;
	for (int i = 0; i < ROUNDS; i++) {
		int k = (r = r * 1103515245 + 12345) >> 8 & 0x7fffffff, at = k % N;
		size_t want = k % 7 ? k % 20000 : k % (3u << 20);
		for (size_t j = 0; j < len[at]; j += 4096)
			sum = sum * 31 + p[at][j];
		if (k % 3) {
			p[at] = realloc(p[at], want + 1);
			if (want > len[at])
				memset(p[at] + len[at], k % 5, want - len[at]);
			len[at] = want;
		} else {
			free(p[at]);
			p[at] = NULL;
			len[at] = 0;
		}
	}
	return (void *)sum;
}
int main(void)
{
	pthread_t t[4];
	for (size_t i = 0; i < 4; i++)
		pthread_create(&t[i], NULL, work, (void *)(i + 1));
	for (int i = 0; i < 4; i++) {
		void *sum;
		pthread_join(t[i], &sum);
		printf("%zx\\n", (size_t)sum);
	}
	return 6;
}
EOF
"""

GO = """cat >main.go <<'EOF'
package main

IMPORT_C
import (
	"crypto/sha256"
	"fmt"
	"os"
	"runtime"
	"sync"
)

func main() {
	var wg sync.WaitGroup
	sums := make([][32]byte, 4)
	for n := range sums {
		wg.Add(1)
		go func(n int) {
			defer wg.Done()
			m := map[int][]byte{}
			for i := 0; i < 30000; i++ {
				m[i%5000] = make([]byte, 100+i%3000)
				m[i%5000][i%100] = byte(n)
			}
			big := BIG
			for i := range big {
				big[i] = byte(i >> 12)
			}
			h := sha256.New()
			for i := 0; i < 5000; i++ {
				h.Write(m[i])
			}
			h.Write(big)
			copy(sums[n][:], h.Sum(nil))
			runtime.GC()
		}(n)
	}
	wg.Wait()
	fmt.Printf("%x\\n", sums)
	os.Exit(5)
}
EOF
export GOCACHE=$PWD/cache GOPATH=$PWD/path GOTOOLCHAIN=local GO111MODULE=off
"""
GO_STATIC = GO.replace("IMPORT_C", "").replace("BIG", "make([]byte, 16<<20)")
GO_DYNAMIC = GO.replace("IMPORT_C", '// #include <stdlib.h>\nimport "C"').replace(
    "BIG", "(*[16 << 20]byte)(C.malloc(16 << 20))[:]"
)

PAGE = """cat >page.html <<'EOF'
<html><body><p id=p></p><canvas id=c width=900 height=900></canvas><script>
let a = [], sum = 0;
for (let i = 0; i < 12; i++) a.push(new Uint8Array(8 << 20).fill(i % 3));
for (let r = 0; r < 4; r++)
  for (const b of a) { b[r * 70000] = r; for (let i = 0; i < b.length; i += 64) sum = (sum * 31 + b[i]) >>> 0; }
const objects = []; for (let i = 0; i < 300000; i++) objects.push({ key: "k" + i % 1000, value: i });
const g = document.getElementById("c").getContext("2d"); g.fillRect(10, 10, 500, 500);
sum += g.getImageData(0, 0, 900, 900).data.reduce((x, y) => x + y, 0);
document.getElementById("p").textContent = "sum " + sum + " " + objects.filter(o => o.key == "k7").length;
</script></body></html>
EOF
"""

CHROMIUM = """timeout 90 chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync \
    --disable-background-networking --disable-component-update --disable-extensions --user-data-dir=$PWD/profile \
    --virtual-time-budget=20000 --dump-dom file://$PWD/page.html 2>log | grep -om1 'sum [0-9][0-9 ]*'"""

AWAIT = """await() { n=0; until "$@" >/dev/null 2>&1; do sleep 0.1; n=$((n + 1)); [ $n -lt 2000 ] || exit 98; done; }
"""
"""A function of the shell's: waits, some minutes at most, until a command succeeds."""

REDIS = (
    AWAIT
    + """redis-server --port 0 --unixsocket s --save '' --dir $PWD --enable-debug-command yes >log 2>&1 & pid=$!
trap "kill $pid 2>/dev/null" EXIT
c='redis-cli -s s'
await $c get x
$c debug populate 60000 key 700
$PYTHON -c 'for i in range(300):
    print("SETRANGE big:%d 0 %s" % (i % 20, chr(65 + i % 3) * 9)); print("SETRANGE big:%d 2000000 x%d" % (i % 20, i))' |
    $c | tail -1
$c bgsave
await sh -c "$c info persistence | grep -q rdb_bgsave_in_progress:0"
$c debug digest; $c dbsize; $c debug reload; $c debug digest
$c --raw eval 'local n=0 for i=1,200000 do n=n+i%7 end return n' 0
$c shutdown nosave; wait $pid; echo $?; rm -f dump.rdb"""
)

POSTGRESQL = """d=/dev/shm/pg-$$; mkdir $d && chown 65534 $d && cd $d && trap 'rm -rf $d' EXIT
as() { setpriv --reuid 65534 --regid 65534 --clear-groups -- env HOME=$d "$@"; }
b=/usr/lib/postgresql/15/bin
as $b/initdb -D data -A trust -U me >/dev/null 2>&1
as $b/pg_ctl -D data -w -s -l log \
    -o "-c listen_addresses= -c unix_socket_directories=$d -c shared_buffers=64MB -c work_mem=32MB" start
q() { as $b/psql -h $d -U me -d postgres -qAt -c "$1"; }
q "create table t as select i, md5(i::text) m, repeat(chr(65 + i % 3), 300) r from generate_series(1, 60000) i"
q "select count(*), md5(string_agg(m, '' order by m)) from t"
q "select i % 10 k, sum(length(r)), max(m) from t group by 1 order by 2, 3"
q "create index on t (m)"; q "update t set r = r || i where i % 4 = 0"; q "vacuum full t"
q "select count(*) from t a join t b on a.m = b.m where b.r like 'A%'"
q "select sum(hashtext(m || r)::bigint) from t"; q "select nonsense"
as $b/pg_ctl -D data -s -w stop; echo $?"""

MARIADB = (
    AWAIT
    + """mariadb-install-db --no-defaults --user=root --datadir=$PWD/data \
    --auth-root-authentication-method=normal >/dev/null 2>&1
mariadbd --no-defaults --user=root --datadir=$PWD/data --socket=$PWD/s --skip-networking --pid-file=$PWD/pid \
    --innodb-buffer-pool-size=64M --skip-log-bin >log 2>&1 & pid=$!; trap "kill $pid 2>/dev/null" EXIT
c="mariadb --no-defaults -S s -N"
await $c -e 'select 1'
$c -e "create database d; use d; create table t (i int primary key, m char(32), r varchar(500));
    insert into t select seq, md5(seq), repeat(char(65 + seq % 3), 300) from seq_1_to_60000;
    select count(*), md5(group_concat(m order by m limit 20)) from t;
    update t set r = concat(r, i) where i % 4 = 0; alter table t add index (m);
    select i % 10 k, sum(length(r)), max(m) from t group by 1 order by 2, 3;
    create temporary table h engine=memory as select i, m from t;
    select sum(crc32(h.m)) from h join t using (m); check table t;"
mariadb-admin --no-defaults -S s shutdown; wait $pid; echo $?"""
)

MEMCACHED = """memcached -u root -s s -m 100 -I 4m -t 4 2>log & pid=$!
$PYTHON -c '
import hashlib, socket, time
for _ in range(300):
    try:
        s = socket.socket(socket.AF_UNIX); s.connect("s"); break
    except OSError: time.sleep(0.1)
f = s.makefile("rwb")
for i in range(4000):
    body = (b"%d" % (i % 50)) * 4000
    f.write(b"set k%d 0 0 %d\\r\\n%s\\r\\n" % (i, len(body), body)); f.flush(); assert f.readline() == b"STORED\\r\\n"
h = hashlib.md5()
for i in range(3990, 4000):
    f.write(b"get k%d\\r\\n" % i); f.flush(); n = int(f.readline().split()[3]); h.update(f.read(n)); f.read(7)
print(h.hexdigest())
'
kill $pid; wait $pid; echo $?; rm -f s"""

NGINX = (
    AWAIT
    + """mkdir -p logs tmp && head -c 3000000 /dev/zero | tr '\\0' a >index.html
cat >conf <<'EOF'
daemon off; pid pid; error_log logs/error; user root; worker_processes 3; events { }
http {
  access_log off; client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp;
  scgi_temp_path tmp; proxy_buffers 8 1m; proxy_buffer_size 1m; proxy_busy_buffers_size 2m; output_buffers 2 2m;
  server { listen unix:HERE/front; location / { proxy_pass http://unix:HERE/back:/; gzip on; gzip_types *; } }
  server { listen unix:HERE/back; root HERE; location / { sendfile off; } } }
EOF
sed -i "s,HERE,$PWD,g" conf
nginx -p $PWD -c $PWD/conf >log 2>&1 & pid=$!
await curl -s --unix-socket front http://x/ -o /dev/null
for i in 1 2 3 4 5 6; do curl -s --unix-socket front http://x/index.html | md5sum; done
curl -s --compressed --unix-socket front http://x/ | md5sum
curl -s -o /dev/null -w '%{http_code}\\n' --unix-socket front http://x/none
kill -QUIT $pid; wait $pid; echo $?; rm -f front back"""
)

JAVA = """cat >Main.java <<'EOF'
import java.util.*;
public class Main {
    public static void main(String[] a) throws Exception {
        Map<Integer, byte[]> live = new HashMap<>();
        long sum = 0;
        Random r = new Random(7);
        for (int i = 0; i < 60000; i++) {
            byte[] b = new byte[r.nextInt(9000)];
            Arrays.fill(b, (byte) (i % 3));
            live.put(r.nextInt(6000), b);
            if (i % 20000 == 0) System.gc();
        }
        int[][] big = new int[12][1 << 20];
        for (int k = 0; k < 12; k++) for (int i = 0; i < big[k].length; i++) big[k][i] = i >> 8;
        for (byte[] b : live.values()) for (byte x : b) sum = sum * 31 + x;
        for (int[] b : big) sum = sum * 31 + Arrays.hashCode(b);
        System.out.println(sum);
        System.exit(9);
    }
}
EOF
javac Main.java
"""

PANDAS = """$PYTHON -c '
import pandas as pd, numpy as np
df = pd.DataFrame({"k": np.arange(200000) % 97, "x": np.random.default_rng(1).normal(size=200000), "y": 1.0})
for i in range(8):
    d = df[df.k < (i * 7) % 97 + 3]; e = d.sort_values("x"); f = e.groupby("k").agg({"x": "mean", "y": "sum"})
    g = pd.concat([d, e]).drop_duplicates(); h = d.merge(f, on="k")
    print(len(g), len(h), h.x_x.sum().round(6), int(pd.util.hash_pandas_object(h).sum()))
'"""

POLARS = """$PYTHON -c '
import polars as pl
df = pl.DataFrame({"x": pl.int_range(2000000, eager=True)}).with_columns((pl.col("x") % 997).alias("k"))
for i in range(6):
    g = df.filter(pl.col("x") % (i + 2) == 0).group_by("k").agg(pl.col("x").sum(), pl.len()).sort("k")
    j = df.join(g, on="k").with_columns((pl.col("x") * 3 + i).alias("z"))
    print(g.shape, j.shape, j["z"].sum(), j["x_right"].max())
'"""

DUCKDB = """$PYTHON -c '
import duckdb
c = duckdb.connect(); c.execute("set enable_progress_bar = false")
def show(q): print(c.execute(q).fetchall())
c.execute("create table t as select i, md5(i::varchar) m, i % 1000 k from range(600000) r(i)")
show("select count(*), max(m), bit_xor(hash(m)) from t")
show("select k, count(*), min(m) from t group by k order by k limit 5")
show("select count(*) from t a join t b on a.m = b.m where b.k < 300")
show("select sum(rank) from (select rank() over (partition by k order by m) rank from t)")
c.execute("update t set m = m || k where i % 3 = 0"); show("select sum(length(m)) from t")
'"""

RUBY = """exec ruby -e 'a = (0..9).map { |i| (65 + i % 3).chr * (4 << 20) }
h = {}; 200_000.times { |i| h["k#{i % 5000}"] = "v" * (i % 90) + i.to_s }; GC.start; GC.compact
6.times { |r| a.each { |s| s[r * 4096, 3] = "xyz"; s << "end" } }
pid = fork { a[0][9] = "?"; exit a[0].sum % 100 }; Process.wait pid; puts $?.exitstatus, a.map(&:sum).inspect
b = (1..800).map { "x" * (1 << 20) }; b.each_index { |i| b[i] = nil if i.even? }; GC.start
puts h.sum { |k, v| v.sum }, b.compact.size; exit 4'"""

PHP = """exec php -d memory_limit=-1 -r '$a = [];
for ($i = 0; $i < 10; $i++) $a[] = str_repeat(chr(65 + $i % 3), 4 << 20);
for ($r = 0; $r < 5; $r++) foreach ($a as &$s) { $s[$r * 5000] = "x"; $s .= "end"; } unset($s);
$m = []; for ($i = 0; $i < 400000; $i++) $m["k" . $i % 9000] = str_repeat("v", $i % 60) . $i;
echo md5(implode($a)), " ", md5(implode($m)), "\\n"; exit(4);'"""

R = """exec Rscript --vanilla -e 'set.seed(1); a <- matrix(rnorm(490000), 700); b <- solve(a)
print(round(sum(a %*% b), 5))
l <- lapply(1:30, function(i) rep(i %% 3, 5e5)); l[[3]][7] <- 9; print(sum(sapply(l, sum)))
for (i in 1:20) { x <- sort(runif(5e5)); l[[1]] <- NULL }; g <- gc(); print(length(l)); quit(status = 4)'"""

OCTAVE = """exec octave-cli --norc --eval 'rand("twister", 1); a = rand(600); b = inv(a);
printf("%.6f\\n", abs(sum((a * b)(:)))); c = {}; for i = 1:12 c{i} = ones(1000) * mod(i, 3); end; c{3}(7) = 9;
printf("%d\\n", sum(cellfun(@(x) sum(x(:)), c))); exit(4)'"""

FFMPEG = """ffmpeg -nostdin -v error -f lavfi -i testsrc=size=1280x720:rate=25:duration=3 -threads 4 \
    -c:v mpeg4 -q:v 5 o.avi &&
ffmpeg -nostdin -v error -i o.avi -vf scale=640:-2,gblur -threads 2 -f md5 - && rm o.avi"""

ERLANG = """HOME=$PWD exec erl -noshell -eval '
B = [binary:copy(<<(65 + I rem 3)>>, 4194304) || I <- lists:seq(1, 10)],
P = self(), [spawn(fun() -> P ! erlang:md5(X) end) || X <- B],
R = lists:sort([receive M -> M end || _ <- B]), io:format("~p~n", [erlang:phash2(R)]),
L = lists:foldl(fun(I, A) -> [{I, integer_to_list(I)} | A] end, [], lists:seq(1, 500000)),
io:format("~p~n", [erlang:phash2(L)]), halt(4).'"""

LUAJIT = """exec luajit -e 'local t = {} for i = 1, 2000000 do t[i] = i % 1000 end
local s = 0 for r = 1, 3 do for i = 1, #t do s = (s * 31 + t[i]) % 2147483647 end end
local x = {} for i = 1, 20 do x[i] = string.rep(string.char(65 + i % 3), 3000000) end
collectgarbage() for i = 1, 20, 2 do x[i] = nil end collectgarbage() print(s, #table.concat({x[2], x[4]}))
os.exit(4)'"""

SBCL = """exec sbcl --noinform --no-userinit --no-sysinit --non-interactive --eval '(let ((h (make-hash-table)) (s 0))
(dotimes (i 400000) (setf (gethash (mod i 7000) h) (make-array (mod i 300) :initial-element (mod i 3))))
(gc :full t)
(maphash (lambda (k v) (setf s (mod (+ (* s 31) k (reduce (function +) v)) 1000000007))) h)
(let ((b (loop repeat 12 collect (make-array 2000000 :element-type (quote (unsigned-byte 8)) :initial-element 7))))
(setf (aref (first b) 5) 9)
(print (list s (reduce (function +) (mapcar (lambda (x) (reduce (function +) x)) b))))))' \
--eval '(sb-ext:exit :code 4)'"""

EMACS = """HOME=$PWD exec emacs -Q --batch --eval '(let ((l (list))
(h (make-hash-table :test (quote equal))))
(dotimes (i 12) (push (make-string 3000000 (+ 65 (% i 3))) l))
(dotimes (i 200000) (puthash (format "k%d" (% i 5000)) (list i i) h)) (garbage-collect)
(with-temp-buffer (dolist (s l) (insert s)) (message "%s %d" (md5 (current-buffer)) (hash-table-count h)))
(kill-emacs 4))'"""

GUILE = """exec guile --no-auto-compile -c '(define v (make-vector 3000000 1)) (vector-set! v 5 9)
(define b (map (lambda (i) (make-string 4000000 (integer->char (+ 65 (modulo i 3))))) (iota 10)))
(define h (make-hash-table))
(do ((i 0 (1+ i))) ((= i 300000)) (hash-set! h (modulo i 5000) (number->string i))) (gc)
(display (list (map (lambda (x) (string-ref x 77)) b) (hash-count (const #t) h) (apply + (vector->list v))))
(exit 4)'"""

OCAML = """cat >m.ml <<'EOF'
let () =
  let h = Hashtbl.create 7 in
  for i = 0 to 600000 do Hashtbl.replace h (i mod 7000) (Bytes.make (i mod 300) 'x') done;
  let big = Array.init 10 (fun i -> Bytes.make 4000000 (Char.chr (65 + i mod 3))) in
  Bytes.set big.(0) 5 '?'; Gc.compact ();
  let d = Array.fold_left (fun a b -> a ^ Digest.to_hex (Digest.bytes b)) "" big in
  print_endline (Digest.to_hex (Digest.string d));
  print_int (Hashtbl.fold (fun _ v a -> a + Bytes.length v) h 0); exit 4
EOF
ocamlopt m.ml -o m"""

RUSTC_SOURCE = """awk 'BEGIN { print "use std::collections::*;";
for (i = 0; i < 30; i++) printf "fn f%d(n: usize) -> usize { let m: BTreeMap<usize, String> = \
(0..n).map(|x| (x * %d, format!(\\"{}\\", x))).collect(); m.values().map(|s| s.len()).sum() }\\n", i, i + 1;
printf "fn main() { let b = vec![7u8; 40 << 20]; println!(\\"{} {}\\", \
b.iter().map(|&x| x as usize).sum::<usize>(), 0";
for (i = 0; i < 30; i++) printf " + f%d(%d)", i, i * 9; print "); std::process::exit(4) }" }' >m.rs"""
# HOME is the directory of the test; rustup's proxy needs the real one to find its toolchain.
RUSTC = """HOME=$(getent passwd $(id -u) | cut -d: -f6) rustc -O -C codegen-units=4 m.rs -o m && ./m
status=$?; rm -f m; exit $status"""

POSTSCRIPT = """awk 'BEGIN { print "%!PS"; for (i = 0; i < 4000; i++) printf "%d %d moveto %d %d lineto stroke\\n",
    i % 600, i % 790, i * 7 % 600, i * 13 % 790; print "showpage" }' >p.ps"""

JEMALLOC_STATIC = "/usr/lib/x86_64-linux-gnu/libjemalloc.a"
MIMALLOC = "/usr/lib/x86_64-linux-gnu/libmimalloc.so.2"
TCMALLOC = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
IMAGEMAGICK = "/usr/bin/convert-im6.q16"
COMPILE_BLOCKS = ALLOCATOR + "gcc -O1 -pthread blocks.c -o blocks"

APPLICATIONS = [
    Program("redis", needs=["redis-server"], command=REDIS, forget="log", joins=1),
    Program(
        "postgresql",
        needs=["/usr/lib/postgresql/15/bin/initdb", "setpriv"],
        command=POSTGRESQL,
        varies=r"/dev/shm/pg-\d+",
    ),
    Program(
        "mariadb",
        needs=["mariadbd", "mariadb-install-db"],
        command=MARIADB,
        forget=r"^(data/|log$)",
        joins=1,
        timeout=400,
    ),
    Program("memcached", needs=["memcached"], command=MEMCACHED, forget="log", joins=1),
    Program("nginx", needs=["nginx", "curl"], command=NGINX, forget=r"^(tmp|logs)/|log$|conf"),
    Program("chromium", needs=["chromium"], prepare=PAGE, command=CHROMIUM, forget=r"^(profile|\.)|log"),
    Program("duckdb", imports=["duckdb"], command=DUCKDB, joins=1),
    Program("pandas", imports=["pandas"], command=PANDAS, joins=1),
    Program("polars", imports=["polars"], command=POLARS),
    Program(
        "go",
        needs=["go"],
        prepare=GO_STATIC + "CGO_ENABLED=0 go build -trimpath -o main main.go; rm -rf cache path",
        command="./main",
        forget="main$",
    ),
    Program(
        "go-dynamic",
        needs=["go", "gcc"],
        prepare=GO_DYNAMIC + "CGO_ENABLED=1 go build -trimpath -o main main.go; rm -rf cache path",
        command="./main",
        forget="main$",
        joins=1,
    ),
    *(
        Program(
            f"java-{gc.lower()}", needs=["javac"], prepare=JAVA, command=f"java -Xmx300m -XX:+Use{gc}GC Main", joins=0
        )
        for gc in ("G1", "Z", "Shenandoah", "Parallel")
    ),
    Program("ruby", needs=["ruby"], command=RUBY, joins=1),
    Program("php", needs=["php"], command=PHP),
    Program("r", needs=["Rscript"], command=R, joins=1),
    Program("octave", needs=["octave-cli"], command=OCTAVE, joins=1),
    Program("ffmpeg", needs=["ffmpeg"], command=FFMPEG),
    Program(
        "ghostscript",
        needs=["gs"],
        prepare=POSTSCRIPT,
        command="gs -q -dNOPAUSE -dBATCH -sDEVICE=png16m -r150 -sOutputFile=o.png p.ps; md5sum o.png; rm o.png",
    ),
    Program("erlang", needs=["erl"], command=ERLANG, forget=r"\.cookie|\.cache|\.config"),
    Program("luajit", needs=["luajit"], command=LUAJIT),
    Program("sbcl", needs=["sbcl"], command=SBCL),
    Program("emacs", needs=["emacs"], command=EMACS, forget=r"^\.emacs"),
    Program("guile", needs=["guile"], command=GUILE),
    Program("ocaml", needs=["ocamlopt"], prepare=OCAML, command="./m"),
    Program("rustc", needs=["rustc"], prepare=RUSTC_SOURCE, command=RUSTC),
    Program(
        "imagemagick",
        needs=[IMAGEMAGICK],
        command=f"""{IMAGEMAGICK} -seed 1 -size 1200x1200 gradient:red-blue -swirl 80 -resize 2000x -blur 0x2 o.ppm &&
            md5sum o.ppm && rm o.ppm""",
    ),
    Program(
        "jemalloc-static",
        needs=[JEMALLOC_STATIC, "g++"],
        prepare=ALLOCATOR + f"gcc -O1 -pthread blocks.c {JEMALLOC_STATIC} -lm -ldl -lstdc++ -o blocks",
        command="./blocks",
    ),
    Program(
        "mimalloc",
        needs=[MIMALLOC, "gcc"],
        prepare=COMPILE_BLOCKS,
        command=f"LD_PRELOAD=$LD_PRELOAD:{MIMALLOC} ./blocks",
        joins=1,
    ),
    Program(
        "mimalloc-first",
        needs=[MIMALLOC, "gcc"],
        prepare=COMPILE_BLOCKS,
        command=f"LD_PRELOAD={MIMALLOC}:$LD_PRELOAD ./blocks",
    ),
    Program(
        "tcmalloc-blocks",
        needs=[TCMALLOC, "gcc"],
        prepare=COMPILE_BLOCKS,
        command=f"LD_PRELOAD=$LD_PRELOAD:{TCMALLOC} ./blocks",
        joins=1,
    ),
    Program(
        "address-sanitizer",
        needs=["gcc"],
        prepare=ALLOCATOR + "gcc -O1 -pthread -fsanitize=address blocks.c -o blocks",
        command="ASAN_OPTIONS=detect_leaks=0 ./blocks",
        varies=r"^samepage: .*\n",
    ),
]

every_application = pytest.mark.parametrize("program", APPLICATIONS, ids=lambda program: program.name)


@pytest.mark.long
@every_application
def test_copies_that_share_pages_run_the_same(runs: Runs, program: Program):
    outcomes, report = runs.merged_copies(program, COPIES, FULL_RATE)
    assert outcomes == [runs.bare(program)] * COPIES
    assert report.joined >= COPIES * program.joins, report


@pytest.mark.long
@every_application
def test_copies_run_the_same_with_default_settings(runs: Runs, program: Program):
    outcomes, _ = runs.merged_copies(program, COPIES)
    assert outcomes == [runs.bare(program)] * COPIES
