"""A training run as sft.py and grpo.py see it: folder, logs, checkpoints, stops in one object."""

import contextlib
import math
import signal
import time

from plumbing.checkpoint import Checkpoints, resume
from plumbing.folder import LOCK, append_jsonl, check_run, hold, open_logger, open_run
from plumbing.ranks import all_gather, all_max, fail, init_distributed, print0, progress
from plumbing.signals import STOPPED, StopSignal


def warmup_within(steps: int, warmup_steps: int) -> int:
    """`warmup_steps`, or a tenth of the steps if a run of so few would end in its warm-up."""
    if warmup_steps < steps:
        return warmup_steps
    print0(
        f"--warmup_steps {warmup_steps} is too long for {steps} steps, which would never reach "
        f"--lr; the warm-up takes {steps // 10} steps instead"
    )
    return steps // 10


class Run:
    """What surrounds a training loop. Call every method on every rank, in the same order.

    `device` is this rank's. `state` is all that a resume needs beside weights and optimiser: the
    number of steps done, how many of the latest were skipped in a row, and what the stage adds (a
    cursor into its data).
    """

    def __init__(self, config):
        """Join the process group and lock --out. Refuses a folder that holds another run.

        Nothing is removed yet.
        """
        self.config, self.folder = config, check_run(config)
        # FSDP2 keeps weights in fp32 and computes in bf16: a single CPU needs a group for it, too.
        self.device = init_distributed(alone=config.dtype == "bf16")
        hold(self.folder / LOCK)
        self.stop = StopSignal()
        self.lost: list[str] = []  # log lines that the disk did not take in this step

    def begin(self, model, tokenizer, optimizer, steps: int, **state):
        """Begin to write. --overwrite clears the folder, --resume loads its newest checkpoint."""
        open_run(self.folder, self.config)
        self.state, self.steps = {"step": 0, **state, "skipped": 0}, steps
        self.warmup_steps = warmup_within(steps, self.config.warmup_steps)
        self.checkpoints = Checkpoints(self.folder, model, tokenizer, optimizer, self.config)
        if self.config.resume:
            self.state.update(resume(self.folder, model, optimizer, self.config))
        self.send = open_logger(self.config.log, self.folder, self.config)
        self.bar = progress(steps, self.state["step"], self.folder.name)

    def start_step(self) -> int:
        """Begin the next step. Returns its number, from 1."""
        self.checkpoints.poll()  # a save that has been written since is put into place
        self.before = dict(self.state)  # saved if a stop signal cuts this step short
        self.started, self.seconds, self.step = time.time(), {}, self.state["step"] + 1
        return self.step

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps (0: never) and at the end is due now."""
        return every > 0 and (self.step % every == 0 or self.step == self.steps)

    @contextlib.contextmanager
    def timer(self, name: str):
        """Add the seconds inside to this step's metric seconds_<name>."""
        began = time.time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.time() - began

    def unless_stopped(self, function, *args, **kwargs):
        """The function's result, or None if a stop signal comes first.

        For work without collectives, or in the lockstep of --tp. Call leave_if_asked afterwards.
        """
        lockstep = getattr(self.config, "tp", 1) > 1
        return self.stop.unless_stopped(function, *args, lockstep=lockstep, **kwargs)

    def write(self, file: str, records: list[dict]):
        """Add this step's records to a log (rank 0). `end_step` reports what the disk refuses."""
        try:
            append_jsonl(self.folder / file, [{"step": self.step, **r} for r in records])
        except OSError as error:
            lines = f"{len(records)} line{'s' * (len(records) > 1)}"
            self.lost.append(f"{lines} of {file} ({error.strerror})")

    def log(self, metrics: dict, shown: tuple[str, ...] = ()):
        """Count the step as done and write its metrics: to metrics.jsonl, to --log, and on screen.

        `tokens_per_s` is the step's `decoded_tokens` over its seconds. Only `shown` are printed.
        """
        step, seconds = self.step, time.time() - self.started
        metrics = metrics | {f"seconds_{name}": value for name, value in self.seconds.items()}
        metrics["seconds"] = seconds
        if "decoded_tokens" in metrics:
            metrics["tokens_per_s"] = metrics["decoded_tokens"] / seconds
        finite = math.isfinite(metrics["grad_norm"])
        self.state |= {"step": step, "skipped": 0 if finite else self.state["skipped"] + 1}
        self.write("metrics.jsonl", [metrics])
        self.send({"step": step, **metrics})
        self.bar.update()
        figures = [f"{name} {metrics[name]:.3g}" for name in shown if name in metrics]
        if figures:
            print0("  ".join([f"step {step}/{self.steps}", *figures]))

    def end_step(self):
        """End a run whose logs are lost or that only skips steps. Save when it is time or asked."""
        step, every, self.before = self.state["step"], self.config.save_every, self.state
        if all_max(len(self.lost), self.device):
            self._report_lost()
        self._check_skipped()
        if step < self.steps:
            if every and step % every == 0:
                self.checkpoints.save(f"step_{step}", self.state)
            self.leave_if_asked()

    def _report_lost(self):
        """Say which log lines were lost. Save and end, unless --on_save_error says continue."""
        step, lost, self.lost = self.state["step"], " and ".join(all_gather(self.lost)[0]), []
        message = f"{self.folder} did not take {lost} at step {step}"
        if self.config.on_save_error == "continue":
            print0(f"warning: {message}; the run goes on without (--on_save_error continue)")
            return
        print0(f"warning: {message}")
        if step < self.steps:  # after the last step, the final model is saved, or says why not
            self._save_before()
            fail(
                f"{message}. The state after that step is saved: make room or mend the folder, "
                "then go on with --resume."
            )

    def _check_skipped(self):
        """End a run whose gradient stays not finite."""
        in_a_row, limit = self.state["skipped"], self.config.max_skipped
        if in_a_row >= limit > 0:
            self.checkpoints.poll(wait=True)
            fail(
                f"a gradient was not finite in {in_a_row} steps in a row, and its update skipped: "
                "look at loss, grad_norm and kl before them in "
                f"{self.folder / 'metrics.jsonl'}, then start again with a lower --lr, or go on "
                "from a checkpoint with --resume (--max_skipped sets this limit)"
            )

    def leave_if_asked(self):
        """After a stop signal to any rank: save the last whole step and leave with exit code 75."""
        if number := self.stop.agreed(self.device):
            self._save_before()
            name, step = signal.Signals(number).name, self.before["step"]
            print0(f"stopped by {name} after step {step}; go on with --resume")
            raise SystemExit(STOPPED)

    def _save_before(self):
        """Save the state after the last whole step, unless that has been done."""
        self.checkpoints.poll(wait=True)
        name = f"step_{self.before['step']}"
        if self.before["step"] and not (self.folder / name / "manifest.json").exists():
            self.checkpoints.save(name, self.before)
            self.checkpoints.poll(wait=True)

    def finish(self):
        """Save the final model."""
        self.bar.close()
        self.checkpoints.save("model")
        self.checkpoints.poll(wait=True)
