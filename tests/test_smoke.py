"""Every script through its command line, in the order of a real run, and what each refuses."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest

import distill
import eval as evaluation
import grpo
import sft
from conftest import ROOT
from data.toy import make_model, make_tokenizer

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node"
TINY = "--max_prompt_tokens 100 --max_completion_tokens 60"


def call(command: str, ranks: int = 1, ok: bool = True) -> str:
    """What `python command` prints, under torchrun if there are several ranks."""
    words = [*f"{TORCHRUN} {ranks}".split() * (ranks > 1), *command.split()]
    options = dict(cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    result = subprocess.run([sys.executable, *words], **options)
    assert (result.returncode == 0) == ok, result.stdout + result.stderr
    return result.stdout + result.stderr


def main(monkeypatch, script, flags: str):
    """The same in this process, which spares the imports."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *flags.split()])
    script.main()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Toy data and a tiny model through distillation and SFT."""
    folder = tmp_path_factory.mktemp("run")
    call(f"-m data.toy --out {folder} --sft 80 --train 80 --test 40 --facts 2 3")
    assert "pass --overwrite" in call(f"-m data.toy --out {folder}", ok=False)
    plans = folder / "plans.jsonl"
    call(f"distill.py --teacher rule --data {folder}/sft.jsonl --out {plans}")
    flags = "--epochs 3 --lr 3e-3 --batch_size 12"
    call(f"sft.py --model {folder}/model --data {plans} --out {folder}/sft {flags}")
    return folder


METRICS = """step reward accuracy outcome plan structure length_reward plan_score format_rate kl
clip_frac entropy completion_tokens plan_tokens truncated zero_variance grad_norm lr sampler_gap
tokens_per_s seconds_rollout seconds_reward seconds_update seconds""".split()


def test_pta_grpo_run(run):
    out = run / "pta"
    start = f"grpo.py --model {run}/sft/model --data {run}/train.jsonl --out {out} {TINY}"
    start += " --questions 4 --max_plan_tokens 30"
    whole = f"{start} --steps 3 --lr 1e-4 --eval_every 2 --show_every 2 --save_every 2"
    whole += f" --eval_data {run}/validation.jsonl --eval_size 6"
    said = call(whole)
    assert "step 3/3" in said and "| question" in said and "eval_accuracy" in said
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert all(name in m for m in metrics for name in METRICS)
    # It is on policy, in fp32.
    assert all(m["sampler_gap"] < 1e-4 and m["clip_frac"] == 0 for m in metrics)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert "eval_accuracy" in metrics[1] and "eval_accuracy" not in metrics[0]
    record = lines(out / "rollouts.jsonl")[0]
    assert len(record["plans"]) == 4
    assert all(len(plan["completions"]) == 3 for plan in record["plans"])
    for plan in record["plans"]:
        right = sum(c["correct"] for c in plan["completions"])
        assert plan["score"] == pytest.approx(right / 3)
        for r in (c["reward"] for c in plan["completions"]):
            total = r["outcome"] + 0.5 * r["plan"] + r["structure"] + r["length"]
            assert r["total"] == pytest.approx(total, abs=2e-4)

    refused = call(start, ok=False)
    assert "already holds a run" in refused and "Traceback" not in refused

    # The checkpoint of step 2 goes on to a third step that equals the undisturbed one.
    (out / "model").rename(out / "away")
    assert "after step 2" in call(f"{whole} --resume")
    again = lines(out / "metrics.jsonl")
    assert len(again) == 3 and timeless(again[2]) == timeless(metrics[2])


def timeless(metrics: dict) -> dict:
    """Without times, and without the grader's counts: it keeps what it has judged before."""
    varying = lambda name: "second" in name or name == "tokens_per_s" or "grader" in name
    return {name: value for name, value in metrics.items() if not varying(name)}


DAPO = "--clip_high 0.28 --dynamic_sampling --overlong_buffer 20 --kl_coef 0 --max_plan_tokens 0"
DR_GRPO = "--std_norm false --loss_agg constant --kl_coef 0"


@pytest.mark.parametrize(
    "flags",
    [
        "--plans 12 --cots 1 --beta 0",
        f"--plans 6 --cots 1 --beta 0 {DAPO}",
        f"--plans 6 --cots 1 --beta 0 {DR_GRPO} --epochs 2 --mini_batches 2",
    ],
    ids=["grpo", "dapo", "dr_grpo, inner epochs"],
)
def test_baselines_are_settings_of_the_same_loop(run, tmp_path, monkeypatch, flags):
    common = f"--model {run}/sft/model --data {run}/train.jsonl --out {tmp_path} {TINY} --steps 1"
    common += " --questions 4 --max_plan_tokens 30 --eval_every 0 --save_every 0 --lr 1e-4"
    main(monkeypatch, grpo, f"{common} {flags}")
    metrics = lines(tmp_path / "metrics.jsonl")
    assert len(metrics) == 1 and (tmp_path / "model/model.safetensors").exists()
    assert ("overlong" in metrics[0]) == ("--overlong_buffer" in flags)


def test_two_ranks_train_and_save(run, tmp_path):
    flags = f"--model {run}/sft/model --data {run}/train.jsonl {TINY} --max_plan_tokens 30"
    flags += " --steps 2 --eval_every 2 --eval_size 5 --lr 1e-4"
    flags += " --dynamic_sampling --dynamic_rounds 2"
    said = call(f"grpo.py --out {tmp_path}/two --questions 4 {flags}", ranks=2)
    assert said.count("step 2/2") == 1 and len(lines(tmp_path / "two/metrics.jsonl")) == 2
    refused = call(f"grpo.py --out {tmp_path}/odd --questions 5 {flags}", ranks=2, ok=False)
    assert "--questions must be a multiple of the 2 ranks" in refused
    flags = f"--model {run}/model --data {run}/plans.jsonl --epochs 1 --batch_size 12"
    call(f"sft.py --out {tmp_path}/sft {flags}", ranks=2)
    assert (tmp_path / "sft/model/model.safetensors").exists()


# --------------------------------------------------------------------------------------------------
# Ranks that fail, and runs that meet

FAILING = """
import time
from pathlib import Path
from grpo import Config
from plumbing import signals
from plumbing.folder import check_run, hold, open_run
from plumbing.ranks import fail, init_distributed, rank

def main():
{body}
    fail("no")

signals.guarded(main)
"""


def refuse(tmp_path, body: str, ranks: int, **environment) -> str:
    """What a script that ends with `fail` says to stderr."""
    script = tmp_path / "refuse.py"
    indented = "\n".join("    " + line for line in body.splitlines())
    script.write_text(FAILING.replace("{body}", indented))
    words = [*f"{TORCHRUN} {ranks}".split() * (ranks > 1), str(script)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment}
    options = dict(env=environment, capture_output=True, text=True, timeout=120)
    result = subprocess.run([sys.executable, *words], **options)
    assert result.returncode == 1
    return result.stderr


def test_ranks_that_fail_alike_print_one_sentence(tmp_path):
    """Also where rank 0 is the last to come: torchrun ends the others as soon as one leaves."""
    said = refuse(tmp_path, "time.sleep(3 * (rank() == 0))", ranks=2)
    assert said.count("error: no\n") == 1 and "rank 1: error" not in said


def test_overwrite_waits_for_the_slowest_rank_to_be_able_to_start(tmp_path):
    folder = tmp_path / "run"
    (folder / "step_1").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "run.json").write_text('{"stage": "training"}')
    body = f"""
signals.PATIENCE = 0
settings = Config(out={str(folder)!r}, overwrite=True)
folder = check_run(settings)
init_distributed("cpu")
if rank() == 0:  # rank 1 fails alone
    open_run(folder, settings)"""
    assert "rank 1: error: no\n" in refuse(tmp_path, body, ranks=2)
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "run.json", "step_1"}


@pytest.fixture
def locked():
    """locked(path): lock that file as another process would."""
    with contextlib.ExitStack() as stack:

        def lock(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text("process 7 on elsewhere\n")
            fcntl.flock(stack.enter_context(open(path)), fcntl.LOCK_EX)

        yield lock


GRPO_FLAGS = "--model {run}/sft/model --data {run}/train.jsonl --steps 1 --questions 4"
SFT_FLAGS = "--model {run}/sft/model --data {run}/plans.jsonl --epochs 1 --batch_size 12"
EVAL_FLAGS = "--model {run}/sft/model --data {run}/test.jsonl --n 1 --limit 2"


@pytest.mark.parametrize(
    "script, out, lock, flags",
    [
        (grpo, "out", "out/.lock", f"{GRPO_FLAGS} --max_plan_tokens 30 {TINY}"),
        (sft, "out", "out/.lock", SFT_FLAGS),
        (evaluation, "out", "out/.lock", f"{EVAL_FLAGS} {TINY}"),
        (distill, "plans.jsonl", ".plans.jsonl.lock", "--data {run}/sft.jsonl --teacher rule"),
    ],
    ids=["grpo", "sft", "eval", "distill"],
)
@pytest.mark.parametrize("more", ["", "--overwrite", "--resume"])
def test_a_second_run_is_kept_out(
    run, tmp_path, monkeypatch, locked, script, out, lock, flags, more
):
    locked(tmp_path / lock)
    refusal = "process 7 on elsewhere is writing there .*: wait for it, stop it, or choose another"
    with pytest.raises(SystemExit, match=refusal):
        main(monkeypatch, script, f"{flags.format(run=run)} --out {tmp_path / out} {more}")
    assert {path.name for path in tmp_path.rglob("*")} <= {"out", ".lock", ".plans.jsonl.lock"}


def test_all_ranks_end_where_another_run_holds_the_lock(tmp_path, locked):
    locked(tmp_path / "run/.lock")
    body = f"""
init_distributed("cpu")
try:
    hold(Path({str(tmp_path / "run/.lock")!r}))
except SystemExit:
    Path({str(tmp_path)!r}, f"refused {{rank()}}").touch()
    time.sleep(2)
    raise"""
    said = refuse(tmp_path, body, ranks=2)
    assert said.count("error: process 7 on elsewhere is writing there") == 1
    assert len(list(tmp_path.glob("refused *"))) == 2


def test_a_rank_that_fails_alone_speaks_for_itself(tmp_path):
    said = refuse(tmp_path, "signals.PATIENCE = 0", ranks=1, RANK="3")
    assert said == "rank 3: error: no\n"


# --------------------------------------------------------------------------------------------------
# Evaluation


def test_eval_writes_records_and_summary(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "e"
    flags = f"--model {run}/sft/model --data {run}/test.jsonl --out {out} --n 4 --limit 10 {TINY}"
    main(monkeypatch, evaluation, flags)
    records, summary = lines(out / "records.jsonl"), json.loads((out / "summary.json").read_text())
    assert len(records) == 10 and all(len(r["samples"]) == 4 for r in records)
    right = sum(s["correct"] for r in records for s in r["samples"])
    assert summary["accuracy"] == pytest.approx(right / 40)
    assert "95 % interval" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already holds results"):
        evaluation.main()


# --------------------------------------------------------------------------------------------------
# Bad input: one sentence that names the remedy, before a model is loaded


@pytest.fixture
def bad(run, tmp_path, monkeypatch):
    """bad(flags): what grpo.py or another script says to them."""

    def refuse(flags, script=grpo):
        load = "load_sharded" if script is grpo else "load_model"
        monkeypatch.setattr(script, load, lambda *a, **k: pytest.fail("a model was loaded first"))
        words = f"--model {run}/sft/model --data {run}/train.jsonl --out {tmp_path}/out"
        words += " --max_completion_tokens 60" + " --max_plan_tokens 30" * (script is grpo)
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, script, f"{words} {flags}")  # the last of two equal flags counts
        message = str(stop.value)
        assert "\n" not in message
        return message

    return refuse


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model nowhere/at/all/model", "no model at 'nowhere/at/all/model'"),
        ("--data nowhere.jsonl", "no data at 'nowhere.jsonl'"),
        ("--questions 0", "--questions must be >= 1, not 0"),
        ("--mini_batches 5", "--mini_batches must divide 1536"),
        ("--max_plan_tokens 0", "set --cots 1"),
        ("--max_plan_tokens 60", "--max_plan_tokens must be below --max_completion_tokens"),
        ("--overlong_buffer 61", "--overlong_buffer is above the completion limit"),
        (
            "--max_completion_tokens 5000",
            "do not fit the model's context of 512; lower --max_completion_tokens",
        ),
        ("--max_prompt_tokens 3", "longer than --max_prompt_tokens 3; raise it"),
        ("--loss_agg mean", "--loss_agg: invalid choice: 'mean' (choose from 'token', 'sequence',"),
        ("--schedule sine", "--schedule: invalid choice: 'sine' (choose from 'constant', 'linear'"),
        ("--shard_within rack", "--shard_within: invalid choice: 'rack' (choose from 'world', 'no"),
        ("--temperature 0", "--temperature must be > 0, not 0"),
        ("--plans 1", "--plans must be >= 2"),
    ],
)
def test_grpo_refuses(bad, flags, message):
    assert message in bad(flags)


def test_bad_data_is_refused_with_its_line(bad, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+1"}\n')
    assert f"{path}, line 2: 'answer' is missing" in bad(f"--data {path}")
    path.write_text("")
    assert "holds no records" in bad(f"--data {path}", script=evaluation)


def test_weights_that_cannot_be_read_are_named_and_the_old_run_stays(run, tmp_path, monkeypatch):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(run / "sft/model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (out / "step_1").mkdir(parents=True)
    (out / "metrics.jsonl").write_text("{}\n")
    (out / "run.json").write_text('{"stage": "training"}')
    flags = f"--model {model} --data {run}/train.jsonl --out {out} --overwrite"
    flags += f" --questions 4 --max_plan_tokens 30 {TINY}"
    said = call(f"grpo.py {flags}", ranks=2, ok=False)
    assert said.count("error: no usable weights at") == 1 and "rank 0 failed" not in said
    refusal = "no usable weights at .*; copy the model's files there again"
    with pytest.raises(SystemExit, match=refusal):
        main(monkeypatch, grpo, flags)
    assert (out / "metrics.jsonl").exists() and (out / "step_1").exists()


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
    assert "unknown flag --stepz; did you mean --steps" in call("grpo.py --stepz 3", ok=False)


PAPER = """plans 4  cots 3  beta 0.5  tau 1.0  alpha 0.1  kl_coef 0.01  clip_low 0.2  lr 1e-06
weight_decay 0.01  questions 128  steps 350"""


def test_help_lists_the_settings_of_the_paper():
    text, words = call("grpo.py --help"), PAPER.split()
    for flag, default in zip(words[::2], words[1::2]):
        assert f"--{flag} " in text and f"[{default}]" in text
