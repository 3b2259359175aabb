"""The quick checks of bench/faults.py that take several processes: kills, and a rank that fails."""

import time

import pytest

from bench import faults


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(work folder, flags, an undisturbed run on two ranks)."""
    work = tmp_path_factory.mktemp("faults")
    flags = [*faults.prepare(work), "--eval_every", "0", "--steps", "3"]
    code, output = faults.finish(faults.launch(2, "grpo.py", *flags, "--out", work / "whole"))
    assert code == 0, output
    return work, flags, work / "whole"


def test_killed_during_a_save_and_resumed_equals_undisturbed(run):
    work, flags, whole = run
    flags = [*flags, "--out", work / "killed"]
    # The save is slow, or this would come too late on a busy machine.
    process = faults.launch(2, "-m", "bench.faults", "inject", "slow", *flags)
    while process.poll() is None and not (work / "killed/step_2.tmp").exists():
        time.sleep(0.01)
    faults.kill(process)
    process.communicate()
    assert not (work / "killed/model").exists()
    code, output = faults.finish(faults.launch(2, "grpo.py", *flags, "--resume", "auto"))
    assert code == 0 and "resuming after step" in output, output
    assert faults.same(work / "killed", whole)


DROP = ("--dynamic_sampling", "--dynamic_rounds", "2", "--steps", "1")


@pytest.mark.parametrize(
    "fault, message, more",
    [("raise", "RuntimeError: injected failure", ()), ("drop", "", DROP)],
    ids=["one rank raises", "one rank's groups are dropped, its rewards late"],
)
def test_one_ranks_trouble(run, fault, message, more):
    work, flags, _ = run
    command = ("-m", "bench.faults", "inject", fault, *flags, "--out", work / fault, *more)
    code, output = faults.finish(faults.launch(2, *command), seconds=200)
    assert (code == 1) == bool(message), output  # -9: it hung
    said = output.count("RuntimeError: injected failure")
    assert said == bool(message)  # once, and no lost connections
    assert "Connection closed" not in output
