"""FSDP2 on two gloo ranks against one process on the same rollouts."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from conftest import ROOT, make_tiny


def run(ranks: int, *flags: str) -> dict:
    """What distributed_worker.py prints."""
    command = [sys.executable]
    if ranks > 1 or "--from" in flags:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(ROOT / "tests" / "distributed_worker.py"), *flags]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    options = dict(capture_output=True, text=True, timeout=240)
    result = subprocess.run(command, env=environment, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def single():
    return run(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The worker's model, and the same with tensor names that only transformers can read."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny("qwen2").save_pretrained(folder / "plain")
    shutil.copytree(folder / "plain", folder / "renamed")
    tensors = load_file(folder / "plain/model.safetensors")
    # Saved without its head, as base models are: transformers adds the prefix on loading.
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "renamed/model.safetensors", metadata={"format": "pt"})
    return folder


CASES = {
    "even": "",
    "all rollouts on one rank": "--uneven",
    "questions dealt out after sampling": "--dealt",
    "options, loaded by rows": "--activation_checkpointing --cpu_offload --from plain",
    "one node's mesh, loaded by rank 0": "--shard_within_node --from renamed",
}


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_two_ranks_equal_one(single, folders, flags):
    words = flags.split()
    double = run(2, *(str(folders / w) if w in ("plain", "renamed") else w for w in words))
    for ours, theirs in zip(double["figures"], single["figures"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)  # loss, gradient norm, KL, entropy
    assert double["weights"] == pytest.approx(single["weights"], rel=1e-6)
    assert double["tokens"] == single["tokens"]  # the sampler saw the same updated weights
