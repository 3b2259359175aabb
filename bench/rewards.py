r"""How fast are programs judged, and what do hostile ones achieve?

    python -m bench.rewards            # everything, some minutes on 2 cores
    python -m bench.rewards --small    # a tenth of the programs, a second of CPU time for each
    python -m bench.rewards --user 65534    # as another user, who must be able to read Python

It prints one table and writes nothing. For mathematics see bench/grading.py.

Bars, on 2 calm cores: 1,000 function tests and 150 stdin tests per second; 1,536 solutions x 10
tests in 40 s; no hostile program passes, writes, removes, sends or leaves anything, and verdicts on
honest programs beside them are what they are alone; all of this as an unprivileged user, too.
"""

import argparse
import json
import os
import platform
import random
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plumbing import runner

SUM = {"inputs": ["3 4\n", "10 -2\n", "7 7\n"], "outputs": ["7\n", "8\n", "14\n"]}
ADD = {"fn": "add", "inputs": [[3, 4], [10, -2], [7, 7]], "outputs": [7, 8, 14]}
READ = "a, b = map(int, input().split())\n"


# --------------------------------------------------------------------------------------------------
# Honest programs, in the forms that models write them

HONEST = {
    "input()": (READ + "print(a + b)", SUM),
    "open(0)": ("print(sum(map(int, open(0).read().split())))", SUM),
    "stdin.buffer": ("import sys\nprint(sum(map(int, sys.stdin.buffer.readline().split())))", SUM),
    "sys.exit at the end": (READ + "import sys\nprint(a + b)\nsys.exit(0)", SUM),
    "exit() at the end": (READ + "print(a + b)\nexit()", SUM),
    "main guard": (
        f"def main():\n    {READ}    print(a + b)\nif __name__ == '__main__':\n    main()",
        SUM,
    ),
    "thread with a large stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        "def main():\n    a, b = map(int, input().split())\n    print(a + b)\n"
        "threading.Thread(target=main).start()",
        SUM,
    ),
    "output at exit": (
        READ + "import atexit, os\natexit.register(lambda: os.write(1, str(a + b).encode()))",
        SUM,
    ),
    "output in a buffer": (
        READ + "import io, sys\nout = io.StringIO()\nreal, sys.stdout = sys.stdout, out\n"
        "print(a + b)\nreal.write(out.getvalue())\nreal.flush()",
        SUM,
    ),
    "numbers as floats": (READ + "print(float(a + b))", SUM),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**6)\n"
        + READ
        + "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(a + b + f(50000) - 50000)",
        SUM,
    ),
    "many imports": (
        "import numbers, heapq, bisect, string, decimal, fractions, typing, dataclasses, enum\n"
        "from collections import *\nfrom functools import lru_cache, cmp_to_key\n"
        + READ
        + "print(a + b)",
        SUM,
    ),
    "sleeps": ("import time\ntime.sleep(30)\n" + READ + "print(a + b)", SUM),
    "prints in a function": ("def add(a, b):\n    print('adding')\n    return a + b", ADD),
    "class Solution": ("class Solution:\n    def add(self, a, b):\n        return a + b", ADD),
    "lambda": ("add = lambda a, b: a + b", ADD),
}


# --------------------------------------------------------------------------------------------------
# Hostile programs. {mark} must not appear, {victim} must stay, {port} must hear nothing.

CTYPES = "import ctypes\nlibc = ctypes.CDLL(None)\n"
HOSTILE = {
    # Forging verdicts
    "prints verdicts": ("print('PASS')\nprint('OK')\nprint('right')\nprint('true')", SUM),
    "prints a protocol's reply": ('print(\'["ok", "7", 0]\')', SUM),
    "right first line only": (READ + "print(a + b if a == 3 else '')", SUM),
    "no output": ("pass", SUM),
    "all likely answers": ("for i in range(100): print(i)", SUM),
    "always equal object": (
        "class T:\n    def __eq__(self, o): return True\n    __hash__ = None\n"
        "def add(a, b): return T()",
        ADD,
    ),
    "always equal int": (
        "class T(int):\n    def __eq__(self, o): return True\n    def __hash__(self): return 0\n"
        "def add(a, b): return T(0)",
        ADD,
    ),
    "always equal str, list, float": (
        "class T(list):\n    def __eq__(self, o): return True\n    def __len__(self): return 0\n"
        "def add(a, b): return T()",
        ADD,
    ),
    "nan": ("def add(a, b): return float('nan')", ADD),
    "signalling NaN": (READ + "print('sNaN')", SUM),
    "infinite numbers": (READ + "print('1e999999999999999999')", SUM),
    "patches json.dumps": (
        "import json\njson.dumps = lambda *a, **k: '7'\ndef add(a, b): return 0",
        ADD,
    ),
    "patches builtins": (
        "import builtins\nbuiltins.AssertionError = BaseException\nbuiltins.isinstance = "
        "lambda *a: True\nbuiltins.all = lambda *a: True\ndef add(a, b): return 0",
        ADD,
    ),
    "patches the sandbox": (
        "import sys\nm = sys.modules['__main__']\nm.encode = lambda v: 7\n"
        "m.find_function = lambda *a: (lambda *b: 7)\ndef add(a, b): return 0",
        ADD,
    ),
    "writes results itself": (
        "import os\nfor fd in range(16):\n    try: os.write(fd, b'7\\n8\\n')\n"
        "    except OSError: pass\ndef add(a, b): return 0",
        ADD,
    ),
    "forges replies on every descriptor": (
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'["ok", "7", 0]\\n\')\n'
        "    except OSError: pass",
        SUM,
    ),
    "sys.exit(0)": ("import sys\nsys.exit(0)", SUM),
    "os._exit(0)": ("import os\nos._exit(0)", ADD),
    "SystemExit in the function": ("def add(a, b): raise SystemExit(0)", ADD),
    "right once, then exit": (
        "import os\nn = 0\ndef add(a, b):\n    global n\n    n += 1\n"
        "    return a + b if n < 3 else os._exit(0)",
        ADD,
    ),
    "GeneratorExit": ("def add(a, b): raise GeneratorExit", ADD),
    # Looking for the expected outputs
    "walks frames": (
        "import sys\nf = sys._getframe()\nfound = []\nwhile f:\n    found += [v for k, v in "
        "f.f_locals.items() if 'output' in str(k)]\n    f = f.f_back\n"
        "def add(a, b): return found[0] if found else None",
        ADD,
    ),
    "searches all objects": (
        "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'outputs' in "
        "o]\ndef add(a, b): return found[0]['outputs'][0] if found else None",
        ADD,
    ),
    "reads the parent's memory": (
        "import os\nprint(open(f'/proc/{{os.getppid()}}/mem', 'rb').read(10))",
        SUM,
    ),
    "process_vm_readv": (
        CTYPES + "import os\nbuf = ctypes.create_string_buffer(8)\n"
        "iov = (ctypes.c_ulong * 2)(ctypes.addressof(buf), 8)\n"
        "print(libc.syscall(310, os.getppid(), iov, 1, iov, 1, 0))",
        SUM,
    ),
    "ptrace": (CTYPES + "import os\nprint(libc.syscall(101, 16, os.getppid(), 0, 0))", SUM),
    "reads the source of the tests": (f"print(open({__file__!r}).read())", SUM),
    "reads the environment": ("import os\nprint(os.environ['BENCH_SECRET'])", SUM),
    "reads the parent's environment": (
        "import os\nprint(open(f'/proc/{{os.getppid()}}/environ').read())",
        SUM,
    ),
    # Files
    "writes a file": ("open({mark!r}, 'w').write('x')", SUM),
    "writes into shared memory": ("open('/dev/shm/bench_rewards', 'w').write('x')", SUM),
    "makes a folder, a link, a pipe": (
        "import os\nfor call in (os.mkdir, os.mkfifo, lambda p: os.symlink('/', p)):\n"
        "    try: call({mark!r})\n    except OSError: pass",
        SUM,
    ),
    "removes a file": ("import os\nos.remove({victim!r})", SUM),
    "removes a tree": (
        "import os, shutil\nshutil.rmtree(os.path.dirname({victim!r}), ignore_errors=True)",
        SUM,
    ),
    "renames and truncates": (
        "import os\nfor call in (lambda: os.rename({victim!r}, {mark!r}), lambda: os.truncate("
        "{victim!r}, 0), lambda: os.chmod({victim!r}, 0)):\n    try: call()\n"
        "    except OSError: pass",
        SUM,
    ),
    "fills the disk": (
        "import os, tempfile\nwith tempfile.TemporaryFile() as f:\n"
        "    while True: f.write(bytes(1 << 20))",
        SUM,
    ),
    "memfd": (
        CTYPES + "fd = libc.syscall(319, b'x', 0)\nimport os\nos.write(fd, bytes(1 << 20))",
        SUM,
    ),
    "openat by hand": (
        CTYPES + "print(libc.syscall(257, -100, {mark!r}.encode(), 0o102, 0o600))",
        SUM,
    ),
    "io_uring": (CTYPES + "print(libc.syscall(425, 8, 0))", SUM),
    "writes what is open": (
        "import os\nfor fd in range(3, 256):\n"
        "    try: os.pwrite(fd, b'x' * 100, 0)\n    except OSError: pass",
        SUM,
    ),
    # Sending
    "connects": ("import socket\nsocket.create_connection(('127.0.0.1', {port})).send(b'x')", SUM),
    "sends a datagram": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto("
        "b'x', ('127.0.0.1', {port}))",
        SUM,
    ),
    "connects through _socket": (
        "import _socket\n_socket.socket(2, 1, 0).connect(('127.0.0.1', " "{port}))",
        SUM,
    ),
    "connects by hand": (
        CTYPES + "print(libc.syscall(41, 2, 1, 0), libc.syscall(53, 1, 1, 0, "
        "(ctypes.c_int * 2)()))",
        SUM,
    ),
    # Processes
    "fork bomb": ("import os\nwhile True: os.fork()", SUM),
    "fork bomb, errors caught": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        SUM,
    ),
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        while True: time.sleep(1)",
        SUM,
    ),
    "vfork and clone by hand": (
        CTYPES + "for call in ((57,), (58,), (56, 17, 0, 0, 0, 0), "
        "(435, 0, 0)): libc.syscall(*call)\nwhile True: pass",
        SUM,
    ),
    "shell": (
        "import os, subprocess\nos.system('touch {mark}')\n" "subprocess.run(['touch', {mark!r}])",
        SUM,
    ),
    "exec": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'touch {mark}'])", SUM),
    "multiprocessing": (
        "import multiprocessing\np = multiprocessing.Process(target=print)\n" "p.start()",
        SUM,
    ),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", SUM),
    "kills its group and all": (
        "import os\nfor call in (lambda: os.kill(0, 9), lambda: os.kill(-1, 9), "
        "lambda: os.killpg(0, 9)):\n    try: call()\n    except OSError: pass",
        SUM,
    ),
    "stops the keeper": ("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)", SUM),
    "SIGIO to its parent": (
        "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())\nfcntl.fcntl(0, 10, 9)\n"
        "fcntl.fcntl(0, fcntl.F_SETFL, 0o20000)",
        SUM,
    ),
    "limits of its parent": (
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        SUM,
    ),
    "limits of its parent, by hand": (
        CTYPES + "import os\nprint(libc.syscall(302, os.getppid(), 0, (ctypes.c_ulong * 2)(), 0))",
        SUM,
    ),
    "undoes its confinement": (
        CTYPES + "print(libc.prctl(22, 0, 0), libc.prctl(1, 0), libc.syscall(317, 1, 0, 0))",
        SUM,
    ),
    "namespaces": (CTYPES + "print(libc.unshare(0x10000000), libc.syscall(272, 0x20000))", SUM),
    "32-bit system call": (
        "import ctypes, mmap\nbuf = mmap.mmap(-1, 4096, prot=7)\n"
        "buf.write(bytes.fromhex('b814000000cd80c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(buf)))()",
        SUM,
    ),
    "x32 system call": (CTYPES + "print(libc.syscall(0x40000000 + 39))", SUM),
    # Time, memory and output
    "endless loop": ("while True: pass", SUM),
    "endless sleep": ("import time\nwhile True: time.sleep(10**6)", SUM),
    "deadlock": ("import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()", SUM),
    "waits for a thread that waits": (
        "import threading\nt = threading.Thread(target=threading.Event().wait)\nt.start()",
        SUM,
    ),
    "ignores all signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        SUM,
    ),
    "raises its own limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
        SUM,
    ),
    "one huge number": ("print(9**9**9)", SUM),
    "endless regular expression": ("import re\nre.match('(a+)+$', 'a' * 99 + 'b')", SUM),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", SUM),
    "memory bomb, errors caught": (
        "x = []\nwhile True:\n    try: x.append(bytearray(10**8))\n" "    except MemoryError: pass",
        SUM,
    ),
    "thread bomb": (
        "import threading\nfor _ in range(10**4):\n    try: threading.Thread(target=threading.Event"
        "().wait, daemon=True).start()\n    except RuntimeError: pass\nwhile True: pass",
        SUM,
    ),
    "output flood": ("while True: print('7' * 10000)", SUM),
    "error flood": ("import sys\nwhile True: sys.stderr.write('7' * 10000)", SUM),
    "reads for ever": ("while True:\n    try: input()\n    except EOFError: pass", SUM),
    "closes its output, then hangs": ("import os\nos.close(1)\nos.close(0)\nwhile True: pass", SUM),
    # Breaking the interpreter, or the judge
    "null pointer": ("import ctypes\nctypes.string_at(0)", SUM),
    "endless recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\n" "def f(n): return f(n + 1)\nprint(f(0))",
        SUM,
    ),
    "recursion in C": ("x = ()\nfor _ in range(10**6): x = (x,)\ndel x\nprint(repr(0))", SUM),
    "deep program": ("print(" + "(" * 5000 + "7" + ")" * 5000 + ")", SUM),
    "long program": ("print(7)" + "#" * 100_000, SUM),
    "null bytes and surrogates": ("print(7)\0\ud800", SUM),
    "no program": ("It cannot be done.", SUM),
    "deep JSON": (
        "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
        ADD,
    ),
    "JSON that lies about its depth": (
        "import os\nos.write(3, b'[' * 10**6 + b'\\n7\\n7\\n')\nos._exit(0)\n"
        "def add(a, b): return 7",
        ADD,
    ),
    "huge integer as a result": ("def add(a, b): return 10 ** 100000", ADD),
    "text that is no UTF-8": ("import os\nos.write(1, bytes(range(128, 256)))", SUM),
    "raises in its repr": (
        "class E(Exception):\n    def __str__(self): raise self\nraise E()",
        SUM,
    ),
    "replaces stdout with a trap": (
        "import sys\nclass T:\n    def __getattr__(self, n): raise KeyboardInterrupt\n"
        "sys.stdout = T()",
        SUM,
    ),
}

# Those that use up their time: a test takes few of them.
TAKES_TIME = """fork bomb, errors caught|vfork and clone by hand|endless loop|endless sleep|
deadlock|waits for a thread that waits|ignores all signals|one huge number|
endless regular expression|memory bomb|memory bomb, errors caught|thread bomb|output flood|
error flood|reads for ever|closes its output, then hangs|endless recursion""".replace("\n", "")
TAKES_TIME = TAKES_TIME.split("|")
assert set(TAKES_TIME) <= set(HOSTILE)


def filled(places: dict) -> dict[str, tuple[str, dict]]:
    """The hostile programs, with their targets filled in."""
    programs = {}
    for name, (code, tests) in HOSTILE.items():
        for key, place in places.items():
            code = code.replace(f"{{{key}!r}}", repr(place)).replace(f"{{{key}}}", str(place))
        programs[name] = code.replace("{{", "{").replace("}}", "}"), tests
    return programs


class Surroundings:
    """A file that must stay, a port that must hear nothing, and the processes that may be there."""

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="bench_rewards_"))
        self.folder.chmod(0o777)
        victim = self.folder / "kept" / "victim"
        victim.parent.mkdir()
        victim.parent.chmod(0o777)
        victim.write_text("here")
        victim.chmod(0o666)
        self.sockets = [socket.create_server(("127.0.0.1", 0))]
        port = self.sockets[0].getsockname()[1]
        self.sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.sockets[1].bind(("127.0.0.1", port))
        os.environ["BENCH_SECRET"] = "secret"
        self.places = {"mark": str(self.folder / "mark"), "victim": str(victim), "port": port}
        self.state = self.look()
        self.others = descendants(os.getpid(), set())  # such as the workers of plumbing/grader.py
        return self

    def look(self) -> tuple:
        files = sorted(str(path) for path in self.folder.rglob("*"))
        contents = [Path(path).read_text() for path in files if Path(path).is_file()]
        modes = [Path(path).stat().st_mode for path in files]
        return files, contents, modes, Path("/dev/shm/bench_rewards").exists()

    def harm(self) -> list[str]:
        """What has changed."""
        found = ["a file was written or removed"] * (self.look() != self.state)
        heard = select.select(self.sockets, [], [], 0)[0]
        found += ["something was sent"] * bool(heard)
        keepers = {worker.process.pid for worker in runner.pool.workers}
        for _ in range(20):  # what was killed may take a moment
            left = descendants(os.getpid(), keepers) - keepers - self.others
            if not left:
                break
            time.sleep(0.1)
        return found + [f"{len(left)} processes were left"] * bool(left)

    def __exit__(self, *_):
        for one in self.sockets:
            one.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def descendants(pid: int, sessions: set[int]) -> set[int]:
    """All processes of which this one is an ancestor, and orphans of these sessions."""
    command = ["ps", "-A", "-o", "pid=,ppid=,sess=,comm="]
    rows = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    split = [row.split(None, 3) for row in rows]
    parents = {int(child): int(parent) for child, parent, _, name in split if name != "ps"}
    found, before = {pid}, set()
    found |= {int(child) for child, _, session, _ in split if int(session) in sessions}
    while found != before:
        before = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


# --------------------------------------------------------------------------------------------------
# Measurements

Job = tuple[str, dict]


def make_job(i: int, kind: str, seed: int) -> tuple[Job, bool]:
    """A solution with 10 tests, and whether it is right: three of ten are not."""
    rng = random.Random(f"{seed} {i}")
    wrong, lists = i % 10 in (2, 5, 8), []
    for _ in range(10):
        lists.append([rng.randrange(-(10**6), 10**6) for _ in range(rng.randint(20, 50))])
    what = "x[0]" if wrong else "x[len(x) // 2]"
    golds = [sorted(x)[len(x) // 2] for x in lists]
    if kind == "function":
        code = (
            f"# {seed} {i}\ndef middle(x):\n    x = x if {wrong} else sorted(x)\n"
            f"    return {what}"
        )
        return (code, {"fn": "middle", "inputs": [[x] for x in lists], "outputs": golds}), not wrong
    code = (
        f"# {seed} {i}\nx = list(map(int, input().split()))\n"
        f"x = x if {wrong} else sorted(x)\nprint({what})"
    )
    inputs = [" ".join(map(str, x)) + "\n" for x in lists]
    return (code, {"inputs": inputs, "outputs": [f"{gold}\n" for gold in golds]}), not wrong


def judge(jobs: list[Job]) -> tuple[list[bool], float]:
    start = time.perf_counter()
    verdicts = runner.passes([tests for _, tests in jobs], [code for code, _ in jobs])
    return verdicts, time.perf_counter() - start


def measure_speed(kind: str, count: int) -> None:
    """Right solutions only, as wrong ones end at their first test."""
    jobs = [make_job(10 * i, kind, 1)[0] for i in range(count)]
    verdicts, seconds = judge(jobs)
    assert all(verdicts)
    show(f"{kind} tests", seconds, f"{10 * count / seconds:,.0f} tests/s in {count} solutions")


def measure_step(count: int) -> None:
    pairs = [make_job(i, ("stdin", "function")[i % 2], 2) for i in range(count)]
    verdicts, seconds = judge([job for job, _ in pairs])
    wrong = sum(verdict != right for verdict, (_, right) in zip(verdicts, pairs))
    show(f"{count:,} solutions x 10 tests", seconds, f"half of each kind; {wrong} wrong verdicts")
    assert not wrong


def measure_honest() -> None:
    verdicts, seconds = judge([*HONEST.values()])
    failing = [name for name, right in zip(HONEST, verdicts) if not right]
    show(f"{len(HONEST)} forms of honest programs", seconds, f"failing: {failing or 'none'}")
    assert not failing


def measure_hostile(around: Surroundings, alone: bool) -> None:
    """Each hostile program in turn, then all of them among honest ones."""
    hostile = filled(around.places)
    keepers = [worker.process.pid for worker in runner.pool.workers]
    passed, slowest, counts = [], (0.0, ""), {}
    start = time.perf_counter()
    for name, job in hostile.items() if alone else ():
        runner.stats(reset=True)
        (right,), seconds = judge([job])
        passed += [name] * right
        slowest = max(slowest, (seconds, name))
        hidden = ("graded", "judged", "peak_mb")
        counts[name] = [key for key, n in runner.stats().items() if n and key not in hidden]
        harm = around.harm()
        assert not harm, f"{name}: {harm}"
    if alone:
        note = f"passed: {passed or 'none'}; slowest {slowest[1]} ({slowest[0]:.1f} s)"
        show(f"{len(hostile)} hostile programs, alone", time.perf_counter() - start, note)
        tally = [outcome for seen in counts.values() for outcome in seen]
        print("  outcomes:", {name: tally.count(name) for name in dict.fromkeys(tally)})
    runner.pool.verdicts.clear()
    runner.stats(reset=True)
    honest = [make_job(i, ("stdin", "function")[i % 2], 3) for i in range(2 * len(hostile))]
    mixed = [(job, right, True) for job, right in honest]
    mixed += [(job, False, False) for job in hostile.values()]
    random.Random(0).shuffle(mixed)
    verdicts, seconds = judge([job for job, _, _ in mixed])
    changed = sum(v != right for v, (_, right, is_honest) in zip(verdicts, mixed) if is_honest)
    through = sum(v for v, (_, _, is_honest) in zip(verdicts, mixed) if not is_honest)
    same = keepers == [worker.process.pid for worker in runner.pool.workers]
    note = f"honest verdicts changed: {changed}; passed: {through}; the same keepers: {same}"
    show(f"{len(honest)} honest beside {len(hostile)} hostile", seconds, note)
    assert not (passed or changed or through or around.harm()) and same


def measure_human_eval(path: str) -> None:
    """Canonical solutions of HumanEval or HumanEval+, of a JSONL file with the hub's columns."""
    from data.code import failing_golds, human_eval

    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    start, records = time.perf_counter(), [human_eval(row) for row in rows]
    left_out = [record for record in records if isinstance(record, str)]
    records = [record for record in records if not isinstance(record, str)]
    tests = sum(len(record["tests"]["inputs"]) for record in records)
    failing = sum(map(bool, failing_golds(records)))
    note = f"{len(records) - failing} of {len(rows)} pass, in {tests} tests; left out {left_out}"
    show("canonical solutions", time.perf_counter() - start, note)


def show(name: str, seconds: float, note: str) -> None:
    print(f"{name:38} {seconds:8.2f} s   {note}", flush=True)


def refuse(message: str) -> None:
    from plumbing.ranks import fail  # not above: another user need not be able to read torch

    fail(message)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tenth of the programs")
    parser.add_argument("--user", type=int, help="id of a user to become first")
    parser.add_argument("--human_eval", help="a JSONL file: check its canonical solutions only")
    parser.error = refuse
    args = parser.parse_args()
    if args.user:
        os.setgroups([])
        os.setgid(args.user)
        os.setuid(args.user)
    if args.small:
        runner.FIRST_LOOK, runner.CPU_SECONDS = 0.3, 1.0
    load, version = os.getloadavg()[0], platform.python_version()
    machine = f"{platform.platform()}, {os.cpu_count()} cores, load {load:.1f}, Python {version}"
    print(f"{machine}, as user {os.getuid()}")
    start = time.perf_counter()
    if reason := runner.not_ready():
        sys.exit(f"error: {reason}")
    show("start of the workers", time.perf_counter() - start, f"{len(runner.pool.workers)} of them")
    if args.human_eval:
        return measure_human_eval(args.human_eval)
    few = 10 if args.small else 1
    measure_honest()
    measure_speed("function", 1000 // few)
    measure_speed("stdin", 200 // few)
    measure_step(1536 // few)
    with Surroundings() as around:
        measure_hostile(around, alone=True)
    keepers = {worker.process.pid for worker in runner.pool.workers}
    runner.pool.drop(*runner.pool.workers)
    assert not descendants(os.getpid(), keepers), "a process was left behind"
    print("nothing was written, removed, sent or left running")


if __name__ == "__main__":
    main()
