"""Judges answers with math-verify, in worker processes with a CPU deadline and a memory cap. rewards.grade calls it.

math-verify's own time-outs rest on SIGALRM, which works on the main thread only, and a thread cannot be stopped. So it
runs in processes of their own: `python grader.py`, one JSON line in, one out. No pickle, no second import of the
caller's __main__, no inherited CUDA state; the same on Linux and macOS, from any thread, after fork or spawn. A worker
is a pair: a keeper that has imported math-verify, and its fork, which grades. The kernel ends the fork at its CPU
deadline, whatever it is doing, and the keeper puts a warm one in its place within milliseconds.
"""
from __future__ import annotations

import atexit
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

CPU_SECONDS = 1.0  # deadline of one answer; CPU time, so that a busy machine does not change a verdict
FIRST_LOOK = 0.3  # its CPU seconds in the first round: slow answers wait until the quick ones are graded
WALL_SECONDS = 20.0  # after which a silent worker is replaced; only a stopped or starved one gets there
RETRIES = 2  # of an answer that lost its worker, or was not reached on a busy machine
START_SECONDS = 120.0  # for a worker to import math-verify
MEMORY = 768 << 20  # address space of a worker in bytes
CACHE_SIZE = 20_000  # verdicts that are remembered, here and in rewards.py


class Worker:
    """The caller's end of one worker."""

    def __init__(self):
        # A session of its own: Ctrl-C reaches the caller only, and one killpg ends keeper and fork.
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, start_new_session=True, bufsize=0)
        self.deadline = float("inf")
        self.unread = b""

    def fileno(self) -> int:  # so that wait() takes a worker
        return self.process.stdout.fileno()

    def await_ready(self) -> None:
        if not wait([self], START_SECONDS) or self.receive() != ["ready"]:
            self.stop()
            raise RuntimeError(f"a grading worker could not start (status {self.process.returncode}): see "
                               f"its error above, and whether math-verify is installed for {sys.executable}")

    def send(self, request: list) -> bool:
        """False if the worker is gone. One request at a time fits into the pipe and is not lost."""
        if self.process.poll() is not None:  # a fork without its keeper still works, but once only
            return False
        self.deadline = time.monotonic() + WALL_SECONDS
        try:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
        except BrokenPipeError:
            return False
        return True

    def receive(self) -> list | None:
        """The messages at hand, once there is something to read; None if the worker is gone."""
        data = os.read(self.fileno(), 65536)
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()

    def stop(self) -> None:
        """The end of input ends the fork, by its CPU deadline, and then the keeper; else force does."""
        self.close()
        try:
            self.process.wait(timeout=2 * CPU_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Pool:
    """This process's workers, counters (rewards.grader_stats) and known verdicts. The lock covers all three."""

    def __init__(self):
        self.lock = threading.Lock()
        self.stats: Counter = Counter()
        self.verdicts: dict[tuple[str, str | None], bool] = {}
        self.workers: list[Worker] = []
        self.jobs = 0

    def judge(self, pairs: list[tuple[str, str | None]], budget: float) -> dict[tuple[str, str | None], bool]:
        """math-verify's verdict on each (gold, answer); with answer None, on whether it can read the gold."""
        verdicts = {pair: self.verdicts.get(pair, False) for pair in pairs}
        todo = [pair for pair in verdicts if pair not in self.verdicts]
        if not todo:
            return verdicts
        self.stats["judged"] += len(todo)
        known: dict = {}
        died, missed, overdue = self.attempt(todo, budget, known)
        if missed and not overdue:
            raise RuntimeError(
                f"grading failed: {len(missed)} of {len(todo)} answers were not reached in "
                f"{1 + RETRIES} times {budget:.0f} s; free the machine's cores, stop what kills its "
                "workers, and resume the run")
        # An answer may kill each worker that it meets; not where plain pairs lose theirs too.
        if died and any(self.attempt(WARM_UP[:len(died)], WALL_SECONDS, {})):
            raise RuntimeError(
                f"grading failed: {len(died)} of {len(todo)} answers lost {1 + RETRIES} workers each, "
                "and so did plain ones; free memory, stop what kills the workers, and resume the run")
        self.stats["over_budget"] += len(missed) + len(overdue)
        self.verdicts.update(known)
        for pair in list(self.verdicts)[:-CACHE_SIZE]:  # oldest first
            del self.verdicts[pair]
        return {**verdicts, **known}

    def attempt(self, pairs: list, budget: float, known: dict) -> tuple[list, list, list]:
        """Grades pairs into known, for budget seconds. Returns those that lost their worker each
        time, those that a busy machine never reached, those for which slow answers left no time.

        The first two kinds are tried again, RETRIES times, each with a budget of its own.
        """
        overdue: list = []
        for left in reversed(range(1 + RETRIES)):
            self.start_workers()
            stop, at_hand = time.monotonic() + budget, len(self.workers)  # a round drops the late ones
            slow, died, missed = self.round(pairs, FIRST_LOOK, stop, known)
            late, died_late, missed_late = self.round(slow, CPU_SECONDS, stop, known)
            self.stats["timeouts"] += len(late)
            known.update(dict.fromkeys(late, False))  # remembered: models repeat their bad answers
            overdue += missed_late
            died += died_late
            if FIRST_LOOK * len(slow) > 0.5 * budget * at_hand:  # not the machine's fault
                overdue, missed = overdue + missed, []
            pairs = died + missed
            if not pairs or not left:
                return died, missed, overdue

    def round(self, pairs: list, cpu_seconds: float, stop: float, known: dict) -> tuple:
        """Grades pairs into known until time stop. Returns those that hit the CPU deadline, those
        whose worker died, and those that were not reached.
        """
        queue, in_flight, slow, died = deque(pairs), {}, [], []
        try:
            while (queue or in_flight) and time.monotonic() < stop:
                for worker in [worker for worker in self.workers if worker not in in_flight][:len(queue)]:
                    self.jobs += 1
                    pair = queue.popleft()
                    if worker.send([self.jobs, cpu_seconds, *pair]):
                        in_flight[worker] = self.jobs, pair
                    else:  # it died idle
                        self.stats["worker_deaths"] += 1
                        died.append(pair)
                        self.replace(worker)
                wake = min([stop, *(worker.deadline for worker in in_flight)]) if in_flight else 0.0
                readable = wait(list(in_flight), max(0.0, wake - time.monotonic()))
                for worker, (job, pair) in list(in_flight.items()):
                    messages = worker.receive() if worker in readable else []
                    if messages is None or worker.deadline < time.monotonic():  # gone, or silent for too long
                        messages = [[job, "worker_deaths", 0]]
                        self.replace(worker)
                    for about, outcome, peak_mb in messages:
                        self.stats[outcome] += 1
                        self.stats["peak_mb"] = max(self.stats["peak_mb"], peak_mb)
                        if about == job:  # else its fork died idle and was replaced
                            del in_flight[worker]
                            if outcome == "slow":
                                slow.append(pair)
                            elif outcome == "worker_deaths":
                                died.append(pair)
                            else:
                                known[pair] = outcome == "right"
        finally:  # out of time, or interrupted: a late reply must not meet the next request
            self.drop(*in_flight)
        return slow, died, [*queue, *(pair for _, pair in in_flight.values())]

    def start_workers(self) -> None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun: the ranks of a machine share its cores
        wanted = max(1, min(4, (os.cpu_count() or 1) // ranks))
        started = [Worker() for _ in range(wanted - len(self.workers))]  # side by side
        for worker in started:
            for left in reversed(range(1 + RETRIES)):
                try:
                    worker.await_ready()
                    break
                except RuntimeError:
                    if not left or worker.process.returncode >= 0:  # not killed: all would fail
                        raise
                    worker = Worker()
            self.workers.append(worker)

    def replace(self, worker: Worker) -> None:
        self.drop(worker)
        self.start_workers()

    def drop(self, *workers: Worker) -> None:
        self.workers = [worker for worker in self.workers if worker not in workers]
        for worker in workers:
            worker.close()  # all of them first, so that they end side by side
        for worker in workers:
            worker.stop()


def _new_pool_after_fork() -> None:
    """A forked child must not share its parent's pipes, keep them open, or find the lock held."""
    global pool
    for worker in pool.workers:
        worker.close()
    pool = Pool()


pool = Pool()
os.register_at_fork(after_in_child=_new_pool_after_fork)
atexit.register(lambda: pool.drop(*pool.workers))


# From here on: inside a worker process.

WARM_UP = [
    (r"-\frac{1}{2}", "-0.5"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"[1,\infty)", r"[1, \infty)"), ("x=5", "5"),
    (r"\{1,\pi\}", r"\pi, 1"), ("y=2x+1", "y-2x=1"), (r"5\text{ cm}", "5"), ("x^2-1", "(x-1)(1+x)"),
    ("x<3", "3>x"), (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("(1,-2)", "(1, -2)"), (r"\frac{2\pi}{3}", r"\frac{2}{3}\pi"), ("1,2", "x=1,x=2"),
    (r"(-\infty,1)\cup[2,\infty)", r"[2,\infty)\cup(-\infty,1)"),
    (r"1\pm\sqrt{2}", r"1+\sqrt{2},1-\sqrt{2}"), (r"\frac{x+1}{2^n}", r"(1+x)2^{-n}"), ("1000", r"10^{3}"),
    (r"\sin^2 x", r"1-\cos^2 x"), (r"e^{2}\ln 2", r"\ln(2)e^2"), (r"\text{Yes}", "yes"), ("3+4i", "4i+3")]
RETIRED = 17  # exit status of a fork that has grown large


def keep() -> None:
    """The keeper: forks; when a fork ends, says why and puts a new one in its place."""
    import logging
    import mmap
    import resource

    for number in (signal.SIGPROF, signal.SIGCHLD):  # the caller may have had them ignored or blocked
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # macOS refuses to limit the address space
            pass
    replies = os.dup(1)
    os.dup2(2, 1)  # a stray print must not end up among the replies
    logging.disable(logging.CRITICAL)

    for gold, answer in WARM_UP:  # forks inherit the warm parser; a judge to whom all is wrong must not start
        if outcome_of(gold, answer) != "right":
            sys.exit(f"math-verify fails the self-test {gold} = {answer}: {outcome_of(gold, answer)}")
    os.write(replies, b'"ready"\n')
    current_job = mmap.mmap(-1, 8)  # shared with the fork: the answer it was at when it died, 0 if none
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
            try:
                os.write(replies, (json.dumps(message) + "\n").encode())
            except BrokenPipeError:  # the caller has dropped this worker
                return


def answer_requests(replies: int, current_job) -> None:
    """The fork. SIGPROF has no handler, so the kernel itself ends the process at the CPU deadline."""
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
    return usage.ru_maxrss >> (20 if sys.platform == "darwin" else 10)  # macOS counts bytes, Linux KiB


def outcome_of(gold: str, answer: str | None) -> str:
    """math-verify's verdict: right, wrong, unparsed (with answer None: of the gold), error_<kind>."""
    from math_verify import verify

    try:
        readings = parse_latex(gold if answer is None else answer)
        readable = any(not isinstance(reading, str) for reading in readings)  # else only the string itself
        # The gold comes first: verify is not symmetric. Its own time-out is off, the deadline is the fork's.
        if answer is None:
            return "right" if readable else "unparsed"
        if verify(parse_latex(gold), readings, timeout_seconds=None, raise_on_error=True):
            return "right"
        return "wrong" if readable else "unparsed"
    except Exception as error:  # whatever sympy raises on nonsense: wrong, and the kind is counted
        return f"error_{type(error).__name__}"


@lru_cache(1_024)
def parse_latex(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=True)


if __name__ == "__main__":
    keep()
