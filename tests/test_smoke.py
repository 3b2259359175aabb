"""Every script through its command line, in the order of a real run, and what each says to bad input."""
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import distill
import eval as evaluation
import grpo
import sft
from conftest import ROOT
from data.toy import make_model, make_tokenizer

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TINY = "--max_prompt_tokens 100 --max_completion_tokens 60".split()


def call(*command, ranks: int = 1, ok: bool = True) -> str:
    launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                    f"--nproc_per_node={ranks}"]
    result = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                            timeout=240)
    assert (result.returncode == 0) == ok, result.stdout + result.stderr
    return result.stdout + result.stderr


def main(monkeypatch, script, *flags):
    """The same in this process, which spares the imports."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    script.main()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Toy data and a tiny model through distillation and SFT."""
    folder = tmp_path_factory.mktemp("run")
    call("-m", "data.toy", "--out", folder, "--sft", 80, "--train", 80, "--test", 40, "--facts", 2, 3)
    assert "pass --overwrite" in call("-m", "data.toy", "--out", folder, ok=False)
    call("distill.py", "--teacher", "rule", "--data", folder / "sft.jsonl", "--out", folder / "plans.jsonl")
    call("sft.py", "--model", folder / "model", "--data", folder / "plans.jsonl", "--out", folder / "sft", "--epochs", 3,
         "--lr", 3e-3, "--batch_size", 12)
    return folder


METRICS = """step reward accuracy outcome plan structure length_reward plan_score format_rate kl clip_frac entropy
completion_tokens plan_tokens truncated zero_variance grad_norm lr sampler_gap tokens_per_s seconds_rollout
seconds_reward seconds_update seconds""".split()


def test_pta_grpo_run(run):
    out = call("grpo.py", "--model", run / "sft/model", "--data", run / "train.jsonl", "--out", run / "pta", "--steps", 3,
               "--questions", 4, "--max_plan_tokens", 30, "--eval_every", 2, "--show_every", 2, "--save_every", 2,
               "--eval_data", run / "validation.jsonl", "--eval_size", 6, "--lr", 1e-4, *TINY)
    assert "step 3/3" in out and "| question" in out and "eval_accuracy" in out
    metrics = lines(run / "pta/metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert all(name in m for m in metrics for name in METRICS)
    assert all(m["sampler_gap"] < 1e-4 and m["clip_frac"] == 0 for m in metrics)  # on-policy, in fp32
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert "eval_accuracy" in metrics[1] and "eval_accuracy" not in metrics[0]
    record = lines(run / "pta/rollouts.jsonl")[0]
    assert len(record["plans"]) == 4 and all(len(plan["completions"]) == 3 for plan in record["plans"])
    for plan in record["plans"]:
        assert plan["score"] == pytest.approx(sum(c["correct"] for c in plan["completions"]) / 3)
        for c in plan["completions"]:
            r = c["reward"]
            assert r["total"] == pytest.approx(r["outcome"] + 0.5 * r["plan"] + r["structure"] + r["length"], abs=2e-4)

    refused = call("grpo.py", "--model", run / "sft/model", "--data", run / "train.jsonl", "--out", run / "pta", *TINY,
                   "--questions", 4, "--max_plan_tokens", 30, ok=False)
    assert "already holds a run" in refused and "Traceback" not in refused

    # The checkpoint of step 2 continues to a third step that equals the undisturbed one.
    (run / "pta/model").rename(run / "pta/away")
    resumed = call("grpo.py", "--model", run / "sft/model", "--data", run / "train.jsonl", "--out", run / "pta", "--steps", 3,
                   "--questions", 4, "--max_plan_tokens", 30, "--eval_every", 2, "--show_every", 2, "--save_every", 2,
                   "--eval_data", run / "validation.jsonl", "--eval_size", 6, "--lr", 1e-4, "--resume", *TINY)
    assert "after step 2" in resumed
    again = lines(run / "pta/metrics.jsonl")
    # Times differ, and so do the grader's counts, as it keeps what it has judged before.
    timeless = lambda m: {k: v for k, v in m.items() if "second" not in k and k != "tokens_per_s" and "grader" not in k}
    assert len(again) == 3 and timeless(again[2]) == timeless(metrics[2])


@pytest.mark.parametrize("flags", [
    "--plans 12 --cots 1 --beta 0",  # GRPO
    "--plans 6 --cots 1 --beta 0 --max_plan_tokens 0 --clip_high 0.28 --dynamic_sampling --overlong_buffer 20 --kl_coef 0",
    "--plans 6 --cots 1 --beta 0 --std_norm false --loss_agg constant --kl_coef 0 --epochs 2 --mini_batches 2",
], ids=["grpo", "dapo", "dr_grpo, inner epochs"])
def test_baselines_are_settings_of_the_same_loop(run, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(grpo, "StopSignal", lambda: SimpleNamespace(  # pytest keeps its signal handlers
        unless_stopped=lambda function, *a, **k: function(*a, **k), agreed=lambda device: 0))
    main(monkeypatch, grpo, "--model", run / "sft/model", "--data", run / "train.jsonl", "--out", tmp_path, "--steps", 1,
         "--questions", 4, "--max_plan_tokens", 30, "--eval_every", 0, "--save_every", 0, "--lr", 1e-4, *TINY, *flags.split())
    assert len(lines(tmp_path / "metrics.jsonl")) == 1 and (tmp_path / "model/model.safetensors").exists()
    assert ("overlong" in lines(tmp_path / "metrics.jsonl")[0]) == ("--overlong_buffer" in flags)


def test_two_ranks_train_and_save(run, tmp_path):
    flags = ["--model", run / "sft/model", "--data", run / "train.jsonl", "--steps", 2, "--max_plan_tokens", 30,
             "--eval_every", 2, "--eval_size", 5, "--lr", 1e-4, "--dynamic_sampling", "--dynamic_rounds", 2, *TINY]
    out = call("grpo.py", "--out", tmp_path / "two", "--questions", 4, *flags, ranks=2)
    assert out.count("step 2/2") == 1 and len(lines(tmp_path / "two/metrics.jsonl")) == 2
    refused = call("grpo.py", "--out", tmp_path / "odd", "--questions", 5, *flags, ranks=2, ok=False)
    assert "--questions 5 does not divide over 2 ranks; legal values near it: 2, 4, 6" in refused
    call("sft.py", "--model", run / "model", "--data", run / "plans.jsonl", "--out", tmp_path / "sft", "--epochs", 1,
         "--batch_size", 12, ranks=2)
    assert (tmp_path / "sft/model/model.safetensors").exists()


def refuse(tmp_path, body: str, ranks: int, **environment) -> str:
    script = tmp_path / "refuse.py"
    script.write_text("import time\nimport checkpoint\nfrom model_utils import fail, rank\n\n"
                      f"def main():\n    {body}\n    fail('no')\n\ncheckpoint.guarded(main)\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] * (ranks > 1)
    result = subprocess.run([sys.executable, *launcher, script], env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    return result.stderr


def test_ranks_that_fail_alike_print_one_sentence(tmp_path):
    """Also where rank 0 is the last to come: torchrun ends the others as soon as one leaves."""
    said = refuse(tmp_path, "time.sleep(3 * (rank() == 0))", ranks=2)
    assert said.count("error: no\n") == 1 and "rank 1: error" not in said


def test_overwrite_waits_for_the_slowest_rank_to_be_able_to_start(tmp_path):
    (tmp_path / "run/step_1").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    (tmp_path / "run/run.json").write_text('{"stage": "training"}')
    said = refuse(tmp_path, f"""from grpo import Config
    from model_utils import init_distributed
    from run_folder import check_run, open_run
    checkpoint.PATIENCE = 0
    settings = Config(out={str(tmp_path / "run")!r}, overwrite=True)
    folder = check_run(settings)
    init_distributed("cpu")
    if rank() == 0:  # rank 1 fails alone
        open_run(folder, settings)""", ranks=2)
    assert "rank 1: error: no\n" in said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "run.json", "step_1"]


@pytest.fixture
def locked():
    """locked(path): lock that file as another process would."""
    with contextlib.ExitStack() as stack:
        def lock(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text("process 7 on elsewhere\n")
            fcntl.flock(stack.enter_context(open(path)), fcntl.LOCK_EX)
        yield lock


@pytest.mark.parametrize("script, out, lock, flags", [
    (grpo, "out", "out/.lock", "--data train.jsonl --steps 1 --questions 4 --max_plan_tokens 30"),
    (sft, "out", "out/.lock", "--data plans.jsonl --epochs 1 --batch_size 12"),
    (evaluation, "out", "out/.lock", "--data test.jsonl --n 1 --limit 2"),
    (distill, "plans.jsonl", ".plans.jsonl.lock", "--data sft.jsonl --teacher rule"),
], ids=["grpo", "sft", "eval", "distill"])
@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)], ids=str)
def test_a_second_run_is_kept_out(run, tmp_path, monkeypatch, locked, script, out, lock, flags,
                                  more):
    locked(tmp_path / lock)
    words = [run / word if word.endswith(".jsonl") else word for word in flags.split()]
    if script is not distill:
        words += ["--model", run / "sft/model"]
    if script in (grpo, evaluation):
        words += TINY
    refusal = "process 7 on elsewhere is writing there .*: wait for it, stop it, or choose another"
    with pytest.raises(SystemExit, match=refusal):
        main(monkeypatch, script, *words, "--out", tmp_path / out, *more)
    assert {path.name for path in tmp_path.rglob("*")} <= {"out", ".lock", ".plans.jsonl.lock"}


def test_all_ranks_end_where_another_run_holds_the_lock(tmp_path, locked):
    locked(tmp_path / "run/.lock")
    said = refuse(tmp_path, f"""from pathlib import Path
    from model_utils import barrier, init_distributed
    from run_folder import hold
    init_distributed("cpu")
    try:
        hold(Path({str(tmp_path / "run/.lock")!r}))
    except SystemExit:
        Path({str(tmp_path)!r}, f"refused {{rank()}}").touch()
        time.sleep(2)
        raise""", ranks=2)
    assert said.count("error: process 7 on elsewhere is writing there") == 1
    assert len(list(tmp_path.glob("refused *"))) == 2


def test_a_rank_that_fails_alone_speaks_for_itself(tmp_path):
    assert refuse(tmp_path, "checkpoint.PATIENCE = 0", ranks=1, RANK="3") == "rank 3: error: no\n"


def test_eval_writes_records_and_summary(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(run / "sft/model"), "--data", str(run / "test.jsonl"), "--out",
                                      str(tmp_path / "e"), "--n", "4", "--limit", "10", *TINY])
    evaluation.main()
    records, summary = lines(tmp_path / "e/records.jsonl"), json.loads((tmp_path / "e/summary.json").read_text())
    assert len(records) == 10 and all(len(r["samples"]) == 4 for r in records)
    assert summary["accuracy"] == pytest.approx(sum(s["correct"] for r in records for s in r["samples"]) / 40)
    assert "95 % interval" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already holds results"):
        evaluation.main()


# ---------------------------------------------------------------------------------------------------------------
# Bad input: one sentence that names the remedy, before a model is loaded

@pytest.fixture
def bad(run, tmp_path, monkeypatch):
    def refuse(*flags, script=grpo):
        monkeypatch.setattr(script, "load_sharded" if script is grpo else "load_model",
                            lambda *a, **k: pytest.fail("a model was loaded first"))
        defaults = {"--model": run / "sft/model", "--data": run / "train.jsonl", "--out": tmp_path / "out",
                    "--max_completion_tokens": 60, "--max_plan_tokens": 30}
        if script is evaluation:
            del defaults["--max_plan_tokens"]
        defaults.update(zip(flags[::2], flags[1::2]))
        monkeypatch.setattr(sys, "argv", ["x", *[str(word) for pair in defaults.items() for word in pair]])
        with pytest.raises(SystemExit) as stop:
            script.main()
        message = str(stop.value)
        assert "\n" not in message
        return message
    return refuse


@pytest.mark.parametrize("flags, message", [
    (("--model", "nowhere/at/all/model"), "no model at 'nowhere/at/all/model'"),
    (("--data", "nowhere.jsonl"), "no data at 'nowhere.jsonl'"),
    (("--questions", 0), "--questions must be >= 1, not 0"),
    (("--mini_batches", 5), "do not divide into --mini_batches 5; choose a divisor of 1536"),
    (("--max_plan_tokens", 0), "set --cots 1"),
    (("--max_plan_tokens", 60), "leaves no room in --max_completion_tokens 60"),
    (("--max_completion_tokens", 5000), "do not fit the model's context of 512; lower --max_completion_tokens"),
    (("--max_prompt_tokens", 3), "longer than --max_prompt_tokens 3; raise it"),
    (("--loss_agg", "mean"), "--loss_agg is token, sequence or constant"),
    (("--schedule", "sine"), "--schedule is constant, linear or cosine"),
    (("--temperature", 0), "--temperature must be > 0, not 0"),
    (("--plans", 1, "--cots", 1), "a group of one completion has no baseline"),
])
def test_grpo_refuses(bad, flags, message):
    assert message in bad(*flags)


def test_bad_data_is_refused_with_its_line(bad, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+1"}\n')
    assert f"{path}, line 2: 'answer' is missing" in bad("--data", path)
    path.write_text("")
    assert "holds no records" in bad("--data", path, script=evaluation)


def test_weights_that_cannot_be_read_are_named_and_the_old_run_stays(run, tmp_path, monkeypatch):
    shutil.copytree(run / "sft/model", tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "out/step_1").mkdir(parents=True)
    (tmp_path / "out/metrics.jsonl").write_text("{}\n")
    (tmp_path / "out/run.json").write_text('{"stage": "training"}')
    command = ["--model", tmp_path / "model", "--data", run / "train.jsonl", "--out", tmp_path / "out", "--overwrite",
               "--questions", 4, "--max_plan_tokens", 30, *TINY]
    said = call("grpo.py", *command, ranks=2, ok=False)
    assert said.count("error: no usable weights at") == 1 and "rank 0 failed" not in said
    monkeypatch.setattr(grpo, "StopSignal", object)
    with pytest.raises(SystemExit, match="no usable weights at .*; copy the model's files there again"):
        main(monkeypatch, grpo, *command)
    assert (tmp_path / "out/metrics.jsonl").exists() and (tmp_path / "out/step_1").exists()


def test_a_model_folder_without_chat_template_gets_the_plain_one(tmp_path, capsys):
    from model_utils import encode_prompt, load_tokenizer
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    make_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(encode_prompt(load_tokenizer(str(tmp_path)), "A = 4 ; A ?")) > 0
    assert "has no chat template: using the plain one" in capsys.readouterr().out


def test_no_flags_and_no_gpu_names_the_demo():
    for script in ("grpo.py", "sft.py"):
        message = call(script, ok=False)
        assert "make demo" in message and "Traceback" not in message
    assert "unknown flag --stepz; did you mean --steps" in call("grpo.py", "--stepz", 3, ok=False)


def test_help_lists_the_settings_of_the_paper():
    text = call("grpo.py", "--help")
    for flag, default in (("plans", "4"), ("cots", "3"), ("beta", "0.5"), ("tau", "1.0"), ("alpha", "0.1"), ("kl_coef", "0.01"),
                          ("clip_low", "0.2"), ("lr", "1e-06"), ("weight_decay", "0.01"), ("questions", "128"), ("steps", "350")):
        assert f"--{flag} " in text and f"[{default}]" in text
