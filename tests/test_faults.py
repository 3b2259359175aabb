"""bench/faults.py's checks that take several processes, the quick ones: kill -9 during a save, a rank that fails."""
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
    out = work / "killed"
    # Slow: on a loaded machine the kill would come too late for a save of milliseconds.
    process = faults.launch(2, "-m", "bench.faults", "inject", "slow", *flags, "--out", out)
    while process.poll() is None and not (out / "step_2.tmp").exists():
        faults.time.sleep(0.01)
    faults.kill(process)
    process.communicate()
    assert not (out / "model").exists()
    code, output = faults.finish(faults.launch(2, "grpo.py", *flags, "--out", out, "--resume", "auto"))
    assert code == 0 and "resuming after step" in output, output
    assert faults.same(out, whole)


@pytest.mark.parametrize("fault, message, more", [
    ("raise", "RuntimeError: injected failure", ()),
    ("drop", "", ("--dynamic_sampling", "--dynamic_rounds", "2", "--steps", "1"))],
    ids=["one rank raises", "one rank's groups are dropped, its rewards late"])
def test_one_ranks_trouble(run, fault, message, more):
    work, flags, _ = run
    process = faults.launch(2, "-m", "bench.faults", "inject", fault, *flags, "--out", work / fault, *more)
    code, output = faults.finish(process, seconds=200)
    assert (code == 1) == bool(message), output  # -9: it hung
    assert output.count("RuntimeError: injected failure") == bool(message)  # once, and no lost connections
    assert "Connection closed" not in output
