"""Judging answers with math-verify, in worker processes with a CPU deadline and a memory cap.

answers.py calls it. math-verify's own time-outs rest on SIGALRM, which works on the main thread
only, and a thread cannot be stopped. So it runs in processes of its own: this file, as a script,
reads a JSON line per answer and writes one back. Nothing is pickled, the caller's __main__ is not
imported again, and no CUDA state is inherited. It works on Linux and macOS, from any thread, after
fork or spawn.

A worker is a pair of processes: a keeper, which has imported math-verify, and its fork, which
judges. The kernel ends the fork at its CPU deadline, whatever the fork is doing. The keeper then
forks again, which takes milliseconds, as math-verify is imported already.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from functools import lru_cache
from multiprocessing.connection import wait

CPU_SECONDS = 1.0  # deadline of one answer, in CPU time: a busy machine does not change a verdict
FIRST_LOOK = 0.3  # CPU seconds in the first round: slow answers wait until quick ones are judged
WALL_SECONDS = 20.0  # then a silent worker is replaced: only a stopped or starved one is so slow
RETRIES = 2  # for an answer that lost its worker, or that a busy machine did not reach
START_SECONDS = 120.0  # for a worker to import math-verify
MEMORY = 768 << 20  # bytes of address space per worker
CACHE_SIZE = 20_000  # how many verdicts are remembered, here and in answers.py
READY = b"ready\n"  # what a worker writes when it can judge

Pair = tuple[str, str | None]  # gold and answer; without an answer: can the gold be read?


# --------------------------------------------------------------------------------------------------
# The caller's side


class Worker:
    """The caller's end of one worker. Its processes start at once; `await_ready` waits for them.

    runner.py has a kind of its own, which runs programs.
    """

    command = [sys.executable, os.path.abspath(__file__)]
    environment: dict[str, str] | None = None  # None: that of the caller
    remedy = f"check that math-verify is installed for {sys.executable}"

    def __init__(self):
        self.spawn()

    def spawn(self):
        # A session of its own: Ctrl-C reaches the caller only, and one killpg ends keeper and fork.
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            bufsize=0, env=self.environment,
        )
        self.ready = False
        self.deadline = float("inf")  # when a silent worker counts as dead
        self.unread = b""

    def fileno(self) -> int:  # so that wait() takes a worker
        return self.process.stdout.fileno()

    def await_ready(self):
        """Wait until it can judge. If it is killed before that, try again, RETRIES times.

        Raises RuntimeError if it cannot start.
        """
        for left in reversed(range(1 + RETRIES)):
            if not self.ready and wait([self], START_SECONDS):
                self.ready = self.greeting() == READY
            if self.ready:
                return
            self.stop()
            if not left or self.process.returncode >= 0:  # not killed: the next would fail, too
                raise RuntimeError(
                    f"a grading worker could not start (status {self.process.returncode}): see its "
                    f"error above, and {self.remedy}"
                )
            self.spawn()

    def greeting(self) -> bytes:
        # Read this line only: the death of an idle fork may be reported behind it.
        return os.read(self.fileno(), len(READY))

    def send(self, request: list) -> bool:
        """False if the worker is gone. One request at a time fits into the pipe: none is lost."""
        if self.process.poll() is not None:  # a fork without its keeper works, but only once
            return False
        self.deadline = time.monotonic() + WALL_SECONDS
        try:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
        except BrokenPipeError:
            return False
        return True

    def receive(self) -> list | None:
        """The messages that have come, once there is one to read. None if the worker is gone."""
        data = os.read(self.fileno(), 65536)
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()

    def stop(self, patience: float = 2 * CPU_SECONDS):
        """End both processes: the end of their input does, or force after `patience` seconds.

        Without input the fork ends, at its CPU deadline at the latest, and then the keeper.
        """
        self.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):  # macOS refuses if it has just ended
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Pool:
    """This process's workers, counters (answers.grader_stats) and known verdicts.

    `lock` guards all three: hold it to use `judge`, `can_read` or `stats`.
    """

    most = 4  # workers, however many cores there are

    def __init__(self):
        self.lock = threading.RLock()
        self.stats: Counter = Counter()
        self.verdicts: dict[Pair, bool] = {}
        self.workers: list[Worker] = []
        self.jobs = 0

    def make_worker(self) -> Worker:
        return Worker()

    def looks(self) -> tuple[float, float]:
        """CPU deadlines of the first round and of the second."""
        return FIRST_LOOK, CPU_SECONDS

    def plain_pairs(self, count: int) -> list[Pair]:
        """Easy ones: workers that do not survive these die of something else than answers."""
        return WARM_UP[:count]

    def end_with_process(self):
        """Workers end with this process, and a forked child gets new ones.

        It must not share its parent's pipes, keep them open, or find the lock held.
        """
        os.register_at_fork(after_in_child=self.begin_anew)
        atexit.register(lambda: self.drop(*self.workers))

    def begin_anew(self):
        for worker in self.workers:
            worker.close()
        self.__init__()

    def start(self):
        """Start the missing workers, and do not wait for them: whoever needs a verdict does.

        Called early, it lets them import math-verify while the model loads.
        """
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun: they share the cores
        wanted = max(1, min(self.most, (os.cpu_count() or 1) // ranks))
        with self.lock:
            while len(self.workers) < wanted:
                self.workers.append(self.make_worker())

    def judge(self, pairs: list[Pair], budget: float) -> dict[Pair, bool]:
        """math-verify's verdict on each (gold, answer).

        `budget` is in seconds. See answers.grade for what happens at its end, and for the errors.
        """
        verdicts = {pair: self.verdicts.get(pair, False) for pair in pairs}
        todo = [pair for pair in verdicts if pair not in self.verdicts]
        if not todo:
            return verdicts
        self.stats["judged"] += len(todo)
        known: dict[Pair, bool] = {}
        died, missed, overdue = self.attempt(todo, budget, known)
        if missed and not overdue:
            raise RuntimeError(
                f"grading failed: {len(missed)} of {len(todo)} answers were not reached in "
                f"{1 + RETRIES} times {budget:.0f} s; free the machine's cores, stop what kills "
                "its workers, and resume the run"
            )
        # Did these answers kill their workers? Not if plain ones lose theirs, too.
        if died and any(self.attempt(self.plain_pairs(len(died)), WALL_SECONDS, {})):
            raise RuntimeError(
                f"grading failed: {len(died)} of {len(todo)} answers lost {1 + RETRIES} workers "
                "each, and so did plain ones; free memory, stop what kills the workers, and resume "
                "the run"
            )
        self.stats["over_budget"] += len(missed) + len(overdue)
        self.verdicts.update(known)
        for pair in list(self.verdicts)[:-CACHE_SIZE]:  # oldest first
            del self.verdicts[pair]
        return {**verdicts, **known}

    def can_read(self, golds: list[str]) -> dict[str, bool]:
        """Whether math-verify can read each gold. There is no budget; CPU_SECONDS bound each."""
        judged = self.judge([(gold, None) for gold in golds], float("inf"))
        return {gold: readable for (gold, _), readable in judged.items()}

    def attempt(
        self, pairs: list[Pair], budget: float, known: dict[Pair, bool]
    ) -> tuple[list[Pair], list[Pair], list[Pair]]:
        """Judge pairs into `known` for `budget` seconds. Returns the others: died, missed, overdue.

        The first lost their worker each time, the second were never reached by a busy machine, and
        to the third slow answers left no time. The first two are tried again, RETRIES times, each
        time with a budget of its own.
        """
        overdue: list[Pair] = []
        first_look, last_look = self.looks()
        for left in reversed(range(1 + RETRIES)):
            self.await_workers()
            stop, workers = time.monotonic() + budget, len(self.workers)  # a round drops late ones
            slow, died, missed = self.round(pairs, first_look, stop, known)
            late, died_late, missed_late = self.round(slow, last_look, stop, known)
            self.stats["timeouts"] += len(late)
            known.update(dict.fromkeys(late, False))  # remembered: models repeat bad answers
            overdue += missed_late
            died += died_late
            if first_look * len(slow) > 0.5 * budget * workers:  # slow answers took the time
                overdue, missed = overdue + missed, []
            pairs = died + missed
            if not pairs or not left:
                return died, missed, overdue

    def round(
        self, pairs: list[Pair], cpu_seconds: float, stop: float, known: dict[Pair, bool]
    ) -> tuple[list[Pair], list[Pair], list[Pair]]:
        """Judge pairs into `known` until time `stop`. Returns the others: slow, died, missed.

        The first hit the CPU deadline, the second lost their worker, the third were not reached.
        """
        queue, in_flight, slow, died = deque(pairs), {}, [], []
        try:
            while (queue or in_flight) and time.monotonic() < stop:
                died += self.hand_out(queue, in_flight, cpu_seconds)
                for pair, outcome in self.collect(in_flight, stop):
                    if outcome == "slow":
                        slow.append(pair)
                    elif outcome == "worker_deaths":
                        died.append(pair)
                    else:
                        known[pair] = outcome == "right"
        finally:  # out of time, or interrupted: a late reply must not meet the next request
            self.drop(*in_flight)
        return slow, died, [*queue, *(pair for _, pair in in_flight.values())]

    def hand_out(self, queue: deque, in_flight: dict, cpu_seconds: float) -> list[Pair]:
        """Send the next pairs to idle workers. Returns those whose worker had died meanwhile."""
        died = []
        idle = [worker for worker in self.workers if worker not in in_flight]
        for worker in idle[:len(queue)]:
            self.jobs += 1
            pair = queue.popleft()
            if worker.send([self.jobs, cpu_seconds, *pair]):
                in_flight[worker] = self.jobs, pair
            else:
                self.stats["worker_deaths"] += 1
                died.append(pair)
                self.replace(worker)
        return died

    def collect(self, in_flight: dict, stop: float) -> list[tuple[Pair, str]]:
        """Wait for replies, until time `stop` at the latest. Returns pairs with their outcomes."""
        decided = []
        wake = min([stop, *(worker.deadline for worker in in_flight)]) if in_flight else 0.0
        readable = wait(list(in_flight), max(0.0, wake - time.monotonic()))
        for worker, (job, pair) in list(in_flight.items()):
            messages = worker.receive() if worker in readable else []
            if messages is None or worker.deadline < time.monotonic():  # gone, or silent too long
                messages = [[job, "worker_deaths", 0]]
                self.replace(worker)
            for about, outcome, peak_mb in messages:
                self.stats[outcome] += 1
                self.stats["peak_mb"] = max(self.stats["peak_mb"], peak_mb)
                if about == job:  # else its fork had died idle, and the keeper forked again
                    del in_flight[worker]
                    decided.append((pair, outcome))
        return decided

    def await_workers(self):
        """Start the missing workers, and wait until all can judge."""
        self.start()
        try:
            for worker in self.workers:
                worker.await_ready()
        finally:
            self.drop(*(worker for worker in self.workers if not worker.ready))

    def replace(self, worker: Worker):
        self.drop(worker)
        self.await_workers()

    def drop(self, *workers: Worker):
        self.workers = [worker for worker in self.workers if worker not in workers]
        for worker in workers:
            worker.close()  # all of them first, so that they end side by side
        for worker in workers:  # do not wait for one that still starts: it reads its input later
            worker.stop(2 * CPU_SECONDS if worker.ready else 0.0)


pool = Pool()
pool.end_with_process()


# --------------------------------------------------------------------------------------------------
# The worker's side

WARM_UP = [
    (r"-\frac{1}{2}", "-0.5"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"[1,\infty)", r"[1, \infty)"),
    ("x=5", "5"), (r"\{1,\pi\}", r"\pi, 1"), ("y=2x+1", "y-2x=1"), (r"5\text{ cm}", "5"),
    ("x^2-1", "(x-1)(1+x)"), ("x<3", "3>x"), ("(1,-2)", "(1, -2)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\frac{2\pi}{3}", r"\frac{2}{3}\pi"), ("1,2", "x=1,x=2"),
    (r"(-\infty,1)\cup[2,\infty)", r"[2,\infty)\cup(-\infty,1)"),
    (r"1\pm\sqrt{2}", r"1+\sqrt{2},1-\sqrt{2}"), (r"\frac{x+1}{2^n}", r"(1+x)2^{-n}"),
    ("1000", r"10^{3}"), (r"\sin^2 x", r"1-\cos^2 x"), (r"e^{2}\ln 2", r"\ln(2)e^2"),
    (r"\text{Yes}", "yes"), ("3+4i", "4i+3"),
]
RETIRED = 17  # exit status of a fork that has grown large


def keep():
    """The keeper: fork, and whenever the fork ends, say why and fork again."""
    import mmap

    confine()
    replies = os.dup(1)
    os.dup2(2, 1)  # a stray print must not end up among the replies
    warm_up()
    os.write(replies, READY)
    current_job = mmap.mmap(-1, 8)  # shared with the fork: the job it was at when it died, or 0
    while True:
        current_job[:] = bytes(8)
        if (fork := os.fork()) == 0:
            answer_requests(replies, current_job)
        _, status, usage = os.wait4(fork, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return  # the end of input: the caller is gone
        if code != RETIRED:
            outcome = "slow" if code == -signal.SIGPROF else "worker_deaths"
            message = [int.from_bytes(current_job[:], "big"), outcome, mebibytes(usage)]
            os.write(replies, (json.dumps(message) + "\n").encode())


def confine():
    """Limit memory, forbid files, and undo what the caller may have done to signals."""
    import logging
    import resource

    for number in (signal.SIGPROF, signal.SIGCHLD):  # the caller may have had them ignored
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # ... or blocked
    limits = {resource.RLIMIT_AS: MEMORY, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS does not limit the address space
            resource.setrlimit(limit, (value, value))
    logging.disable(logging.CRITICAL)


def warm_up():
    """Warm the parser, which forks inherit, and refuse to start if it fails these easy cases."""
    for gold, answer in WARM_UP:
        outcome = outcome_of(gold, answer)
        if outcome != "right":
            sys.exit(f"math-verify fails the self-test {gold} = {answer}: {outcome}")


def answer_requests(replies: int, current_job):
    """The fork. SIGPROF has no handler, so the kernel itself ends it at the CPU deadline."""
    import resource

    code, unread = 1, b""
    try:
        while data := os.read(0, 65536):
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                job, cpu_seconds, gold, answer = json.loads(line)
                current_job[:] = job.to_bytes(8, "big")
                signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
                outcome = outcome_of(gold, answer)
                signal.setitimer(signal.ITIMER_PROF, 0)
                current_job[:] = bytes(8)
                peak_mb = mebibytes(resource.getrusage(resource.RUSAGE_SELF))
                os.write(replies, (json.dumps([job, outcome, peak_mb]) + "\n").encode())
                if peak_mb > MEMORY >> 21:  # half of the cap: a fresh fork starts small
                    code = RETIRED
                    return
        code = 0
    finally:
        os._exit(code)


def mebibytes(usage) -> int:
    return usage.ru_maxrss >> (20 if sys.platform == "darwin" else 10)  # macOS: bytes, Linux: KiB


def outcome_of(gold: str, answer: str | None) -> str:
    """math-verify's verdict: right, wrong, unparsed or error_<kind>.

    With answer None: right if the gold can be read, else unparsed.
    """
    from math_verify import verify

    try:
        readings = parse_latex(gold if answer is None else answer)
        # Text that it cannot read comes back as a string.
        readable = any(not isinstance(reading, str) for reading in readings)
        if answer is None:
            return "right" if readable else "unparsed"
        # The gold comes first: verify is not symmetric. Its own time-out is off, as the fork has
        # a deadline.
        if verify(parse_latex(gold), readings, timeout_seconds=None, raise_on_error=True):
            return "right"
        return "wrong" if readable else "unparsed"
    except Exception as error:  # whatever sympy raises on nonsense: wrong, and the kind is counted
        return f"error_{type(error).__name__}"


@lru_cache(1_024)
def parse_latex(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig()]
    return parse(f"${text}$", config, parsing_timeout=None, raise_on_error=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the caller has dropped this worker, or is gone
        keep()
