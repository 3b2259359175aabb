"""Stop signals, and one message when a run fails."""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from plumbing.ranks import all_max, make_screen_safe, printable, rank, world_size

STOPPED = 75  # exit code of a run that was asked to stop and saved: EX_TEMPFAIL, "try again later"

# --------------------------------------------------------------------------------------------------
# Stop signals

# SIGHUP: the terminal that the run was started on is gone.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """Raised by a stop signal where `unless_stopped` allows it, or by work in lockstep."""


class StopSignal:
    """The first of STOP_SIGNALS asks for a stop at the next safe point. A second one ends at once.

    SIGHUP stays ignored where it was, as under nohup.
    """

    came = False  # to this process, at any time
    heeded = False  # work in lockstep is running that asks, at each step, whether one came

    def __init__(self):
        self.number, self.interruptible = 0, False
        # A thread sees a signal even while the main thread waits in a collective, where no Python
        # handler runs.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._sockets = reader, writer
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _watch(self, reader: socket.socket):
        first = None
        while number := reader.recv(1)[0]:
            first = first or time.monotonic()
            # Ctrl-C and batch systems signal torchrun and its ranks, and torchrun passes its own
            # signal on. So an echo of the first within two seconds is not a second one.
            if number in STOP_SIGNALS and time.monotonic() - first > 2:
                os._exit(128 + number)

    def _on_signal(self, number: int, frame):
        self.number, StopSignal.came = self.number or number, True
        if self.interruptible:
            self.interruptible = False
            raise Interrupted

    def unless_stopped(self, function, *args, lockstep: bool = False, **kwargs):
        """The function's result, or None if a signal comes first.

        For work whose result can be dropped. It has no collectives, or is in `lockstep`: then no
        signal may leave other ranks alone in a collective. The function itself raises Interrupted,
        on all ranks at the same step (plumbing/thin.py).
        """
        try:
            self.interruptible, StopSignal.heeded = not lockstep, lockstep
            if self.number and not lockstep:
                return None
            result = function(*args, **kwargs)
            self.interruptible = False
            return result
        except Interrupted:
            return None
        finally:
            self.interruptible = StopSignal.heeded = False

    def agreed(self, device) -> int:
        """The number of a signal that any rank has seen, or 0: the same on all. A collective."""
        return all_max(self.number, device)


# --------------------------------------------------------------------------------------------------
# Failures

PATIENCE = 30  # seconds that a refusing rank gives rank 0 to say why


def guarded(main):
    """Run a script's `main`. If a rank raises, the job ends, and says why once (per node).

    torchrun stops the other ranks when one leaves. A failed rank must not leave by way of its
    process group, which can wait for the dead for ever. The others must not report the connections
    that they lost.
    """
    code, message, orderly = 1, "", False
    make_screen_safe()
    try:
        main()
        code, orderly = 0, True
    except SystemExit as stop:
        code = stop.code if stop.code in (0, STOPPED) else 0 if stop.code is None else 1
        orderly = code != 1
        if not orderly:
            message = why_refused(stop)
    except KeyboardInterrupt:
        # No StopSignal takes it in an evaluation, nor before a training's first step.
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends the ranks another
            signal.signal(number, signal.SIG_IGN)
        code, message = STOPPED, "stopped by Ctrl-C" if claim_first_failure() else ""
    except BaseException as error:
        if claim_first_failure():
            message = out_of_memory(error) or f"rank {rank()} failed:\n{traceback.format_exc()}"
    if message:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(printable(message), file=sys.stderr)  # a traceback may quote foreign text
    if orderly:
        close_distributed()
        flush_screen()
        if world_size() == 1:
            sys.exit(code)
        atexit._run_exitfuncs()
    flush_screen()
    # Not by way of the interpreter's end: there a thread of the process group can abort a run whose
    # work is done.
    os._exit(code)


def flush_screen():
    """Write out what has been printed, or drop it if the terminal is gone.

    The interpreter's end would try again, fail, and turn the exit code into 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def why_refused(stop: SystemExit) -> str:
    """What this rank prints of a refusal. Bad input fails on all ranks, and only rank 0 says so.

    torchrun kills all ranks when one exits, so this waits until rank 0 has spoken. A rank that is
    still alive afterwards has failed alone, and prints its own message.
    """
    claim_first_failure()  # peers that lose this rank are to keep quiet
    message = stop.code if isinstance(stop.code, str) else ""
    if rank() == 0 or not message:
        return message
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0 if StopSignal.came else PATIENCE)
    return "" if StopSignal.came else f"rank {rank()}: {message}"


def claim_first_failure() -> bool:
    """Register this rank's failure. Returns whether no other rank has failed before.

    The lost connections that its peers then meet are only the echo.
    """
    if world_size() == 1 or not dist.is_initialized():
        return True
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        options = dict(is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        store = dist.TCPStore(*address, **options)
        return store.add(f"failures {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, ValueError):  # the store went down with the rank that failed
        return False


def out_of_memory(error: BaseException) -> str | None:
    """The one sentence to print for an error, if memory ran out."""
    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
        return None
    where = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if "ask_local" in where:
        remedy = "in the teacher: lower --concurrency"
    elif "decode" in where:
        remedy = (
            "in a rollout: set --rollout_rows below the rows that the line 'KV cache' named, or "
            "lower --max_completion_tokens"
        )
    elif where & {"update", "all_logprobs", "sft_loss"}:
        remedy = (
            "in a micro-batch: lower --tokens_per_micro_batch, or turn on "
            "--activation_checkpointing or --cpu_offload"
        )
    else:
        remedy = "for model and optimiser: use more ranks, or turn on --cpu_offload"
    return f"error: rank {rank()} ran out of memory {remedy}; then go on with --resume"


def close_distributed():
    if dist.is_initialized():
        dist.destroy_process_group()
