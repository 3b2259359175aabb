"""plumbing/threads.py: how many threads a rank has, and how they wait."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT
from plumbing import threads

SHOW = "import os, plumbing.threads; print(os.environ['OMP_NUM_THREADS'], os.environ['{}'])"


def settings(outer: dict, inner: dict, second: str = "OMP_WAIT_POLICY") -> list[str]:
    """What a process has set when its parent began with `outer`, and gave it `inner` as well."""
    ours = "OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT TORCHELASTIC_RUN_ID LOCAL_WORLD_SIZE"
    ours = ours.split()
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    words = [f"{name}={value}" for name, value in inner.items()]
    shell = 'env "$@"; true'  # a shell that stays: it is the parent, as torchrun is of its ranks
    command = ["bash", "-c", shell, "bash", *words, sys.executable, "-c", SHOW.format(second)]
    done = subprocess.run(command, cwd=ROOT, env=clean | outer, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_single_process_takes_all_usable_cores_and_its_threads_sleep():
    cores = len(os.sched_getaffinity(0))
    assert settings({}, {}) == [str(min(cores, threads.usable_cores())), "PASSIVE"]
    assert settings({}, {}, "GOMP_SPINCOUNT")[1] == "1000"
    assert settings({"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}, {}) == ["3", "ACTIVE"]


def test_ranks_share_the_cores_unless_the_user_has_chosen():
    """torchrun sets 1 where nothing is set, and says so. That is no choice of the user's."""
    rank = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    assert settings({}, rank)[0] == str(max(1, threads.usable_cores() // 2))
    assert settings({}, rank | {"LOCAL_WORLD_SIZE": "1"})[0] == str(threads.usable_cores())
    assert settings({"OMP_NUM_THREADS": "1"}, rank | {"LOCAL_WORLD_SIZE": "1"})[0] == "1"


@pytest.mark.parametrize("text, cores", [("max 100000", 8), ("200000 100000", 2), ("5 10", 1)])
def test_a_containers_quota_limits_the_cores(text, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert threads.usable_cores() == cores
