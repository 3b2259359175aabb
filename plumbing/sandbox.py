"""Runs a program that a model wrote, in a process that may do nothing but compute. For runner.py.

runner.py starts this file as a script, the keeper. Three kinds of processes:

  keeper    has imported what programs import, and proven that the filter works. It reads no order.
  handler   a fork of the keeper for one solution. It reads the order and hands on what comes out.
  child     a fork of the handler for one run: the only one that executes the program.

Expected outputs are in none of them: runner.py compares. So a program that forges a verdict, exits
early, patches modules or searches the memory has nothing to find. The keeper never holds an order,
so a program cannot find another solution there either.

What keeps a child from doing harm is a list of the system calls that it may make (seccomp, which
needs neither root nor a namespace). It may read and write what is open, allocate memory and start
threads. It cannot open files, sockets or devices, start or signal processes, or get code that is
not there already run by the processor. Limits on CPU, memory and output come on top. This is no
boundary against an attacker with an exploit of the kernel: for that, run the whole training in a
virtual machine.

An order is a frame (8 bytes of length, then JSON). So is each input that follows it; an empty frame
ends the solution. Replies are JSON lines: [why, output, peak memory in MiB].
"""

import ast
import builtins
import contextlib
import ctypes
import gc
import importlib
import io
import json
import math
import os
import platform
import random
import resource
import select
import signal
import struct
import sys
import threading
import time

MEMORY = 1 << 30  # bytes of address space per child: threads reserve much more than they use
OUTPUT = 4 << 20  # bytes of output per run
STACK = 64 << 20  # of the main thread, and of others unless the program says so
POLL_SECONDS = 0.05  # how often a handler looks at a running child
STILL_SECONDS = 2.0  # a child that sleeps so long waits for something that never comes
READY = b"ready\n"
DONE = 17  # exit status of a handler that has finished a solution; 0: the end of input

# What programs may import: the parts of the standard library that compute. A child cannot open
# files, so whatever is not imported now does not exist for it.
MODULES = """
abc array ast atexit base64 bdb binascii bisect bz2 calendar cmath cmd codecs collections
collections.abc colorsys concurrent.futures contextlib copy copyreg csv ctypes dataclasses datetime
decimal difflib dis doctest encodings.ascii encodings.cp1252 encodings.idna encodings.latin_1
encodings.utf_16 enum errno fractions functools gc graphlib hashlib heapq hmac html inspect io
itertools json keyword linecache locale logging lzma math numbers operator os pdb pickle platform
pprint queue random re reprlib resource sched secrets select shlex signal socket sre_constants
stat statistics string stringprep struct subprocess sys tempfile textwrap threading time timeit
token tokenize traceback types typing unicodedata unittest urllib.parse uuid warnings weakref zlib
zoneinfo _strptime
""".split()


# --------------------------------------------------------------------------------------------------
# The filter

X86_64, X32 = 0xC000003E, 0x40000000
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS, EXECUTABLE, NEW_THREAD = 1, 38, 0x4, 0x10000
CALLS = [
    0, 1, 20,  # read, write, writev: of what is open
    3, 5, 8, 262,  # close, fstat, lseek, newfstatat (which libc's fstat calls)
    11, 12, 25, 28,  # munmap, brk, mremap, madvise
    13, 14, 15, 131,  # signals that come to the child itself
    24, 39, 102, 104, 107, 108, 110, 186, 218,  # yield, who am I
    60, 231,  # exit
    96, 98, 201, 228, 229,  # clocks and resource use
    202, 273, 334,  # futex, and what threads set up
    318,  # getrandom
]
# Left out on purpose: fcntl and ioctl, which can have a signal sent to another process, and
# prlimit, which can set the limits of another.
MAPS = [9, 10]  # mmap and mprotect: without execution, so no new machine code
SLEEPS = [35, 230]  # nanosleep, clock_nanosleep: they return at once, a child's time is CPU time
CLONE, CLONE3 = 56, 435


def filter_program():
    """The filter in the form that prctl takes: a BPF program in a struct sock_fprog."""
    load, equal, bits_set, at_least, give = 0x20, 0x15, 0x45, 0x35, 0x06
    deny = (give, 0, 0, ERRNO | EPERM)
    steps = [
        (load, 0, 0, 4), (equal, 1, 0, X86_64), (give, 0, 0, KILL),  # 32-bit calls
        (load, 0, 0, 0), (at_least, 0, 1, X32), (give, 0, 0, KILL),
    ]
    for number in CALLS:
        steps += [(equal, 0, 1, number), (give, 0, 0, ALLOW)]
    for number in SLEEPS:
        steps += [(equal, 0, 1, number), (give, 0, 0, ERRNO)]  # error 0: success
    for number in MAPS:  # the third argument is the protection
        steps += [(equal, 0, 4, number), (load, 0, 0, 32), (bits_set, 0, 1, EXECUTABLE), deny]
        steps += [(give, 0, 0, ALLOW)]
    steps += [(equal, 0, 1, CLONE3), (give, 0, 0, ERRNO | ENOSYS)]  # libc then calls clone
    steps += [(equal, 0, 3, CLONE), (load, 0, 0, 16), (bits_set, 0, 1, NEW_THREAD)]
    steps += [(give, 0, 0, ALLOW), deny]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    head = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    return ctypes.create_string_buffer(head), code  # both must stay alive


def prctl(*arguments: int):
    result = libc.prctl(*(ctypes.c_ulong(argument) for argument in arguments))
    if result:
        raise OSError(ctypes.get_errno(), f"prctl {arguments[0]} failed")


def die_with(parent: int):
    """Have the kernel kill this fork when its parent ends, however that ends."""
    prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


# --------------------------------------------------------------------------------------------------
# Values as JSON


def encode(value):
    """A Python value as JSON can hold it. Raises TypeError for anything but plain data.

    A tuple becomes a list. What JSON lacks becomes a dict with one odd key.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):  # JSON has no infinities
        return float(value) if math.isfinite(value) else {"<float>": str(float(value))}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: encode(item) for key, item in value.items()}
        pairs = [[encode(key), encode(item)] for key, item in value.items()]
        return {"<dict>": sorted(pairs, key=json.dumps)}
    if isinstance(value, (set, frozenset)):
        return {"<set>": sorted(map(encode, value), key=json.dumps)}
    if isinstance(value, complex):
        return {"<complex>": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"<bytes>": value.hex()}
    raise TypeError(f"a {type(value).__name__} is not plain data")


# --------------------------------------------------------------------------------------------------
# A child


def be_child(order: dict, data, ends: tuple[int, int], cpu_seconds: float):
    """One run of the program. Never returns."""
    code = 1
    try:
        code = run_program(order, data, confine(order, ends, cpu_seconds))
    except SystemExit as end:
        code = 0 if end.code in (None, 0) else 2
    except MemoryError:
        code = 3
    except BaseException:
        code = 2
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def confine(order: dict, ends: tuple[int, int], cpu_seconds: float):
    """Give up everything but the two pipes. Returns the file for a function's results."""
    is_function = order["fn"] is not None
    os.dup2(ends[0], 0)
    os.dup2(nothing if is_function else ends[1], 1)
    os.dup2(nothing, 2)
    os.dup2(ends[1] if is_function else nothing, 3)
    os.closerange(4, 256)
    whole = int(cpu_seconds) + 2  # the handler is more exact: this is the second wall
    for limit, value in (
        (resource.RLIMIT_CPU, whole), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 16), (resource.RLIMIT_STACK, STACK),
    ):
        resource.setrlimit(limit, (value, value))
    text = dict(encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdin, results = open(0, **text), open(3, "w", **text)
    sys.stdout, sys.stderr = open(1, "w", **text), open(2, "w", **text)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.setrecursionlimit(10_000)
    sys.set_int_max_str_digits(0)
    random.seed(0)  # a program gets the same verdict every time
    prctl(38, 1, 0, 0, 0)  # no new privileges: else only root may set a filter
    prctl(22, 2, ctypes.addressof(filter_), 0, 0)
    return results


def run_program(order: dict, data, results) -> int:
    """Execute the program; of a function, write a line of JSON per result. Returns the status."""
    scope = {"__name__": "__main__", "__builtins__": builtins}
    if order["before"]:
        exec(order["before"], scope)
    exec(compile(order["code"], "solution.py", "exec"), scope)
    if order["fn"] is not None:
        call = find_function(scope, order["fn"])
        for given in data:
            arguments = eval_literal(given) if order["literal"] else given
            results.write(json.dumps(encode(call(*arguments))) + "\n")
        results.flush()
        return 0
    # What the interpreter does at its end. Some programs print only then.
    threading._shutdown()
    import atexit

    atexit._run_exitfuncs()
    sys.stdout.flush()
    return 0


def find_function(scope: dict, name: str):
    solution = scope.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    return scope[name]


def eval_literal(text: str) -> list:
    """A Python literal, with inf and nan, which EvalPlus's inputs hold."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(node, field, [infinite(item) for item in value])
            elif isinstance(value, ast.AST):
                setattr(node, field, infinite(value))
    return ast.literal_eval(tree)


def infinite(node):
    name = node.id if isinstance(node, ast.Name) else None
    return ast.Constant(float(name)) if name in ("inf", "nan") else node


# --------------------------------------------------------------------------------------------------
# A handler


def handle(replies: int, keeper: int):
    """Serve one solution, then end. Never returns."""
    code = 1
    try:
        die_with(keeper)
        body = read_frame()
        if body is None:
            code = 0
            return
        order = json.loads(body)
        while body := read_frame():
            write_all(replies, json.dumps(run(order, json.loads(body))).encode() + b"\n")
        code = DONE
    finally:
        os._exit(code)


def read_frame() -> bytes | None:
    """The next frame, and nothing behind it: that is for the next handler. None at the end."""
    head = read_exactly(8)
    return None if head is None else read_exactly(int.from_bytes(head, "big"))


def read_exactly(size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(0, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_all(to: int, data: bytes):
    left = memoryview(data)
    while left:
        left = left[os.write(to, left):]


def run(order: dict, data) -> list:
    """[why, output, peak memory in MiB] of one run.

    `data` is the text of stdin, or the list of a function's arguments. Why: "ok", or "slow",
    "stuck", "output", "memory", "error" or "crash".
    """
    text = b"" if order["fn"] is not None else data.encode("utf-8", "surrogateescape")
    (out_of, into), (results, results_end) = os.pipe(), os.pipe()
    handler = os.getpid()
    if (pid := os.fork()) == 0:
        die_with(handler)
        be_child(order, data, (out_of, results_end), order["cpu"])
    os.close(out_of)
    os.close(results_end)
    why, output = attend(pid, text, into, results, order["cpu"])
    if why != "ok":
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    os.close(results)
    if why == "ok":
        code = os.waitstatus_to_exitcode(status)
        # Unless the handler has done it, SIGKILL comes from the limit on CPU time.
        names = {0: "ok", 3: "memory", -signal.SIGKILL: "slow", -signal.SIGXCPU: "slow"}
        why = names.get(code, "error" if code > 0 else "crash")
    return [why, output.decode("utf-8", "surrogateescape"), usage.ru_maxrss >> 10]


def attend(pid: int, text: bytes, into: int, results: int, cpu_seconds: float) -> tuple[str, bytes]:
    """Feed a child and collect its output, until it ends or meets a limit."""
    os.set_blocking(into, False)
    left, output, writers = memoryview(text), bytearray(), [into]
    ended, readers = os.pidfd_open(pid), [results]
    watch = watcher(pid, cpu_seconds)
    next(watch)
    why = "ok"
    while why == "ok":
        if writers and not left:
            os.close(writers.pop())
        readable, writable, _ = select.select([*readers, ended], writers, [], POLL_SECONDS)
        if writable:
            try:
                left = left[os.write(into, left[:65536]):]
            except BrokenPipeError:
                left = left[:0]
        if results in readable:
            part = os.read(results, 1 << 16)
            output += part
            readers = [results] if part else []
            why = "output" if len(output) > OUTPUT else "ok"
        elif ended in readable:  # and all that it wrote has been read
            break
        why = next(watch) if why == "ok" else why
    for end in writers + [ended]:
        os.close(end)
    return why, bytes(output[:OUTPUT])


def watcher(pid: int, cpu_seconds: float):
    """Yields "ok", "slow" or "stuck" each time it is asked. Looks at the child now and then.

    Deadlines are CPU time, so a busy machine changes no verdict. A child that sleeps uses none: it
    is stuck, as nothing that it may do could wake it after so long.
    """
    per_second, looked, used, since = os.sysconf("SC_CLK_TCK"), time.monotonic(), -1, 0.0
    why = "ok"
    while True:
        yield why
        now = time.monotonic()
        if now - looked < POLL_SECONDS:
            continue
        looked = now
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        if ticks != used or fields[0] != "S":
            used, since = ticks, now
        if ticks / per_second >= cpu_seconds:
            why = "slow"
        elif now - since > STILL_SECONDS:
            why = "stuck"


# --------------------------------------------------------------------------------------------------
# The keeper

PROOF = """
import os, signal, socket
def refused(call, *arguments):
    try:
        call(*arguments)
    except PermissionError:
        return True
    return False
def proof():
    print("not a result")
    return [refused(*call) for call in (
        (os.open, "/", 0), (os.open, "/dev/null", 1), (os.mkdir, "/dev/null/x"), (os.fork,),
        (os.unlink, "/dev/null/x"), (socket.socket,), (os.kill, os.getppid(), 0), (os.pipe,),
        (os.execv, "/dev/null/x", ["x"]), (os.listdir, "/"),
    )]
"""


def keep():
    """The keeper: a handler for each solution, until the end of input."""
    global libc, filter_, filter_code, nothing
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXCPU):  # the caller may ignore them
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    replies, nothing = os.dup(1), os.open("/dev/null", os.O_WRONLY)
    os.dup2(2, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    filter_, filter_code = filter_program()
    prepare()
    order = dict(code=PROOF, fn="proof", before="", literal=False, cpu=10.0)
    why, output, _ = run(order, [[]])
    if (why, output.strip()) != ("ok", json.dumps([True] * 10)):
        sentence = (
            f"this kernel does not confine programs ({why}, {output[:100]!r}): use one that has "
            "seccomp filters\n"
        )
        write_all(replies, sentence.encode())
        sys.exit(1)
    write_all(replies, READY)
    while True:
        select.select([0], [], [])
        keeper = os.getpid()
        if (handler := os.fork()) == 0:
            handle(replies, keeper)
        code = os.waitstatus_to_exitcode(os.waitpid(handler, 0)[1])
        if code != DONE:  # the end of input; or it died, and what it has not read is lost
            sys.exit(code != 0)


def prepare():
    """Import what programs import, and leave nothing of the caller's in sight."""
    for name in MODULES:
        with contextlib.suppress(ImportError):  # some builds lack a few
            importlib.import_module(name)
    sys.modules["datetime"].datetime.strptime("2020", "%Y")  # imports on first use
    builtins.exit = builtins.quit = sys.exit  # which site.py would define
    os.environ.clear()
    os.chdir("/")
    sys.argv, sys.path, sys.orig_argv = ["solution.py"], [], ["python", "solution.py"]
    sys.modules["atexit"]._clear()
    assert io and platform  # imported for programs
    gc.collect()
    gc.freeze()  # a child that collects would copy all of it


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the caller is gone
        keep()
