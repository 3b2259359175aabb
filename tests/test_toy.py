"""The embedded task: arithmetic by hand, splits, reproducibility, the tokenizer's round trip."""

import hashlib
import json

import pytest
from transformers import AutoTokenizer

from data.toy import (
    evaluate_facts,
    make_model,
    make_problems,
    make_tokenizer,
    needed,
    plan_of,
    split_of,
    write_solution,
)

FACTS = {"A": ("4",), "F": ("A", "+", "2"), "B": ("9",), "D": ("B", "-", "A"), "C": ("A", "+", "F")}


def test_values_needs_solution_and_plan_by_hand():
    values = evaluate_facts(FACTS)
    assert values == {"A": 4, "F": 6, "B": 9, "D": 5, "C": 0}  # 4 + 6 = 10, last digit 0
    assert needed(FACTS, "C") == ["A", "F", "C"] and needed(FACTS, "D") == ["B", "A", "D"]
    solution = write_solution(FACTS, ["A", "F", "C"])
    assert solution == "A = 4 ; F = A + 2 = 4 + 2 = 6 ; C = A + F = 4 + 6 = 0"
    assert plan_of(solution) == "C needs A F ; F needs A ; A needs nothing"


OTHER_TEXTS = ["", "First we add.", "A = 4 ; then F", "A = 4 ; F = A + 2 = 4 + 2"]


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_plan_of_refuses_other_texts(text):
    with pytest.raises(ValueError, match="not a linked-quantities solution"):
        plan_of(text)


def test_solutions_end_in_the_answer_and_full_ones_compute_everything_needed():
    for record in make_problems("train", 200, terse=0.0):
        steps = record["solution"].split(" ; ")
        assert steps[-1][-1] == record["answer"] and steps[-1][0] == record["problem"][-3]
        known = {}
        # An independent reading of the CoT: every step uses computed values, and is right.
        for step in steps:
            name, formula, *rest = step.split(" = ")
            if rest:
                values = " ".join(str(known.get(word, word)) for word in formula.split())
                left, sign, right = values.split()
                result = int(left) + int(right) if sign == "+" else int(left) - int(right)
                assert rest[0] == values and int(rest[1]) == result % 10
            known[name] = int(step[-1])


def test_terse_solutions_are_right_but_leave_steps_out():
    full, terse = (make_problems("train", 300, terse=share) for share in (0.0, 1.0))

    def leaves_out(record) -> bool:
        """Whether a computed step uses a quantity that no step computes."""
        names = [step[0] for step in record["solution"].split(" ; ")]
        facts = dict(fact.split(" = ") for fact in record["problem"].split(" ; ")[:-1])
        used = {word for name in names for word in facts[name].split() if word.isalpha()}
        return not used <= set(names)

    assert not any(map(leaves_out, full))
    assert sum(map(leaves_out, terse)) > 200  # the others have no step to spare
    assert all(record["solution"][-1] == record["answer"] for record in terse)
    mean = lambda records: sum(len(r["solution"]) for r in records) / len(records)
    assert mean(terse) < mean(full)


def test_splits_share_no_problem_and_a_shuffled_copy_stays_in_its_split():
    seen = {}
    for split in ("train", "validation", "test"):
        for seed in (0, 1):
            for record in make_problems(split, 300, seed=seed):
                key = " ; ".join(sorted(record["problem"].split(" ; ")))
                assert seen.setdefault(key, split) == split
    facts, target = "A = 4 ; F = A + 2 ; B = 9".split(" ; "), "F ?"
    orders = facts, facts[::-1], facts[1:] + facts[:1]
    assert len({split_of(" ; ".join([*order, target])) for order in orders}) == 1


def test_difficulty_is_the_number_of_facts():
    for low, high in ((4, 4), (5, 6)):
        records = make_problems("test", 100, facts=(low, high))
        counts = {record["problem"].count(";") for record in records}
        assert counts == set(range(low, high + 1))


def test_a_seed_gives_the_same_bytes_everywhere():
    text = json.dumps(make_problems("train", 50, seed=3, terse=0.5))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "84e0686542945c6d"


def test_tokenizer_is_word_level_and_survives_a_qwen2_folder(tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer, width=16, layers=1, heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)  # as every stage does
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<plan>\nC needs A\n</plan>\n<think>\nA = 4\n</think>\n<answer>\n\\boxed{4}\n</answer>"
    ids = loaded.encode(text)
    assert loaded.unk_token_id not in ids and len(ids) == 13
    decoded = "<plan> C needs A </plan> <think> A = 4 </think> <answer> \\boxed{ 4 } </answer>"
    assert loaded.decode(ids) == decoded
    turns = [{"role": "system", "content": "no"}, {"role": "user", "content": "A = 4 ; A ?"}]
    prompt = loaded.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|> A = 4 ; A ? <|end|> <|assistant|> "
    assert loaded.unk_token_id not in loaded.encode(prompt)


def test_what_the_task_cannot_give_is_refused():
    with pytest.raises(ValueError, match="a problem has 1 to 6 facts, not 6 to 5"):
        make_problems("train", 1, facts=(6, 5))
    too_many = "different problems of 1 to 1 facts, not 100: ask for fewer"
    with pytest.raises(ValueError, match=too_many):
        make_problems("train", 100, facts=(1, 1))
