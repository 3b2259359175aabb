"""FSDP2 on two gloo ranks against one process on the same rollouts."""
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT


def run(ranks: int, *flags: str) -> dict:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(ROOT / "tests" / "distributed_worker.py"), *flags], env=environment,
                            capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def single():
    return run(1)


@pytest.mark.parametrize("flags", [(), ("--uneven",)], ids=["even", "all rows on one rank"])
def test_two_ranks_equal_one(single, flags):
    double = run(2, *flags)
    for ours, theirs in zip(double["figures"], single["figures"]):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)  # loss, gradient norm, KL, entropy
    assert double["weights"] == pytest.approx(single["weights"], rel=1e-6)
    assert double["tokens"] == single["tokens"]  # the sampler saw the same updated weights
