"""bench.gpu's dry run: every part runs on a CPU, fails alone, and leaves a table and a file."""

import json
import sys

import pytest
import torch.distributed as dist
from torch.nn.attention.varlen import _varlen_attn

from bench import gpu, gpu_kernels
from bench.step_model import Constants, read_constants


def run(monkeypatch, tmp_path, *flags) -> dict:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--out", str(out), *flags])
    gpu.main()
    return json.loads(out.read_text())


def test_a_dry_run_measures_every_constant(monkeypatch, tmp_path, capsys):
    """All with a + in step_model. The kernel of varlen_attn is for GPUs only."""
    for package in ("datasets", "math_verify"):  # a rented machine may lack them
        monkeypatch.setitem(sys.modules, package, None)
    with _varlen_attn.set_kernel_enabled("cpu", enabled=False):  # pretend_gpu may have made one
        record = run(monkeypatch, tmp_path)
    text = (gpu.Path(gpu.__file__).parent / "step_model.py").read_text()
    daggers = {line.split(":")[0].strip() for line in text.splitlines() if "# + " in line}
    assert set(record["constants"]) == daggers - {"varlen_memory"} <= set(vars(Constants()))
    assert list(record["failed"]) == ["varlen_attn, 3 rows, 64 places"]
    whats = [row["what"] for row in record["rows"]]
    assert sum(what.endswith(": right") for what in whats) == 5
    assert not any("WRONG" in what for what in whats)
    printed = capsys.readouterr().out
    assert all(f"| {what} | " in printed for what in [*whats, *record["failed"]])
    with pytest.raises(SystemExit, match="dry run"):
        read_constants(str(tmp_path / "gpu.json"))


def test_a_part_that_fails_does_so_alone(monkeypatch, tmp_path):
    def broken(bench):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(gpu, "PARTS", (broken, gpu_kernels.host_copies))
    record = run(monkeypatch, tmp_path)
    assert record["failed"] == {"broken": "RuntimeError: no such kernel and more"}
    assert list(record["constants"]) == ["wait_us"]
    with pytest.raises(SystemExit, match="no part"):
        run(monkeypatch, tmp_path, "--part", "cooking")


def test_a_wrong_kernel_is_called_wrong(monkeypatch, tmp_path):
    """Attention that forgets its mask is another attention."""
    real = gpu_kernels.attend

    def forgetful(query, key, value, mask, **options):
        mask = mask if query.dtype == gpu_kernels.torch.float32 else mask * 0
        return real(query, key, value, mask, **options)

    monkeypatch.setattr(gpu_kernels, "attend", forgetful)
    record = run(monkeypatch, tmp_path, "--part", "decode_attention")
    assert record["rows"][0]["what"].startswith("masked SDPA") and "WRONG" in str(record["rows"][0])


def test_a_whole_step_in_a_process_group_of_one(monkeypatch, tmp_path):
    """A lone GPU has one, for FSDP2. The models that are only counted must not be cut by it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        record = run(monkeypatch, tmp_path, "--part", "whole_step")
    finally:
        dist.destroy_process_group()
    assert not record["failed"] and len(record["rows"]) == 4
    gap = record["rows"][-1]
    assert gap["what"].startswith("sampler_gap") and gap["measured"] < 1e-4
