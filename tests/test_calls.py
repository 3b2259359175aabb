"""Calls: forced tokens in the sampling loop and in the update, tools, and what cannot be forged."""

import copy
import json
import random
from fractions import Fraction

import pytest
import torch

import eval as evaluation
import grpo
from conftest import make_tiny
from data import doors, toy, walk
from data.verifiers import reading
from data.worlds import replies
from grpo import Config, Group, Rollout
from model_utils import INSTRUCTION, encode_prompt, shard_model
from plumbing import calls, decoder
from plumbing.attention import use_attention
from plumbing.calculator import calculate
from plumbing.calls import encode_result, find_calls, forged
from plumbing.log import rollout_records
from plumbing.revision import call_metrics, count, revision_text, shares
from rewards import parse_completion
from sft import Config as SftConfig
from sft import count_tokens, encode_record, sft_loss

CPU = torch.device("cpu")
END, CALL, VOCAB = 1, 4, 40  # ids of a model without words: 4 ends a call
PROMPTS = [[5, 6, 8, 9], [10, 11, 12, 13, 14, 15], [16, 17]]


# --------------------------------------------------------------------------------------------------
# Forced tokens


def reply(prompt: list[int], ids: list[int]) -> list[int]:
    """Three tokens that depend on the text so far; the last one is a stop token."""
    return [20 + (sum(ids) + len(prompt)) % 10, 30, END]


def respond(rollouts: list[Rollout]):
    for r in rollouts:
        own = not r.given or r.given[-1] < len(r.ids) - 1
        if own and not r.is_plan and not r.forced and r.ids[-1] == CALL:
            r.forced, r.calls = reply(r.prompt, r.ids), r.calls + 1


@pytest.fixture(scope="module")
def models():
    """The same weights twice: with our attention, and as transformers has them."""
    plain = make_tiny("qwen2", vocab_size=VOCAB)
    return shard_model(use_attention(copy.deepcopy(plain))), plain


def by_hand(plain, prompt: list[int], limit: int) -> tuple[list[int], list[int]]:
    """transformers' generate, stopped at each call and continued after the reply."""
    ids, given = [], []
    while len(ids) < limit:
        options = dict(do_sample=False, eos_token_id=[END, CALL], pad_token_id=0)
        whole = torch.tensor([prompt + ids])
        out = plain.generate(whole, max_new_tokens=limit - len(ids), **options)
        ids = out[0, len(prompt) :].tolist()
        if ids[-1] != CALL:
            break
        for token in reply(prompt, ids)[: limit - len(ids)]:
            given.append(len(ids))
            ids.append(token)
    return ids, given


@pytest.mark.parametrize("max_rows", [2, 100])
def test_greedy_decode_with_calls_equals_generate_continued_by_hand(models, max_rows):
    model, plain = models
    rollouts = [Rollout(prompt, [40]) for prompt in PROMPTS]
    options = dict(temperature=0.0, top_p=1.0, stop_ids=[END], seed=0, max_rows=max_rows)
    grpo.decode(model, rollouts, respond=respond, **options)
    assert [(r.ids, r.given) for r in rollouts] == [by_hand(plain, p, 40) for p in PROMPTS]
    assert sum(r.calls for r in rollouts) > 3


@pytest.fixture(scope="module")
def drawn(models):
    """A tree of 36 completions with calls, and its rollouts as a list."""
    config = Config(
        plans=3,
        cots=4,
        max_completion_tokens=43,
        max_plan_tokens=10,
        rollout_rows=8,
        kl_coef=0.0,
        tokens_per_micro_batch=400,
    )
    options = dict(plan_closed=lambda ids: ids[-1] % 5 == 0 and len(ids) > 2, stop_ids=[END])
    trees = grpo.sample_tree(models[0], PROMPTS, config, seed=3, respond=respond, **options)
    return config, [r for tree in trees for r in tree]


def test_sampled_logprobs_are_teacher_forced_and_replies_are_nobodys_choice(models, drawn):
    _, rollouts = drawn
    numbers, cut = [], 0
    for place, r in enumerate(rollouts):
        with torch.no_grad():
            logprobs = models[1](torch.tensor([r.prompt + r.ids])).logits[0].log_softmax(-1)
        wanted, k = [], r.plan_tokens
        while k < len(r.ids) and not r.is_plan:  # each call after the plan, and its reply
            if r.ids[k] == CALL and k + 1 < len(r.ids):
                said = reply(r.prompt, r.ids[: k + 1])[: len(r.ids) - k - 1]
                assert r.ids[k + 1 : k + 1 + len(said)] == said
                cut += len(said) < 3
                wanted += range(k + 1, k + 1 + len(said))
                k += len(said)
            k += 1
        assert r.given == wanted
        for k, token in enumerate(r.ids):
            expected = float(logprobs[len(r.prompt) + k - 1, token])
            assert r.logprobs[k] == pytest.approx(0.0 if k in r.given else expected, abs=2e-5)
        assert not r.stopped or len(r.ids) - 1 not in r.given  # a said stop token stops nothing
        assert r.stopped or r.is_plan or len(r.ids) == 43  # the limit counts all tokens
        numbers.append(r.number)
        assert r.number == place or r.is_plan or not r.plan_tokens
    assert cut > 0 and sum(len(r.given) for r in rollouts) > 60
    assert sum(r.ids[: r.plan_tokens].count(CALL) for r in rollouts)  # not answered in plans


def test_update_counts_own_tokens_only_and_its_gradient_is_a_plain_masked_loss(models, drawn):
    model, plain = models
    config, rollouts = drawn
    own = sum(len(r.ids) - len(r.given) for r in rollouts)
    rng = random.Random(0)
    for r in rollouts:
        r.advantage = r.plan_advantage = rng.uniform(-1, 1)
    micros = grpo.make_micro_batches(rollouts, config, CPU)
    assert len(micros) > 1 and sum(int(m.packed.mask.sum()) for m in micros) == own
    for m in micros:
        logprobs, _ = model.token_logprobs(m.packed)
        assert ((logprobs - m.sampler_logprobs).abs() * m.packed.mask).max() < 2e-5
        (-(logprobs * m.advantages) * m.weights).sum().backward()
    entropy = 0.0
    for r in rollouts:
        logprobs = plain(torch.tensor([r.prompt + r.ids])).logits[0].log_softmax(-1)
        chosen = [len(r.prompt) + k for k in range(len(r.ids)) if k not in r.given]
        targets = torch.tensor((r.prompt + r.ids))[chosen]
        rows = logprobs[torch.tensor(chosen) - 1]
        (-rows.gather(1, targets[:, None]).sum() * r.advantage / own).backward()
        entropy -= float((rows.exp() * rows).sum().detach()) / own
    for a, b in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    metrics = grpo.update(model, torch.optim.SGD(model.parameters(), 0.0), micros, config, 0.0)
    assert metrics["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert metrics["sampler_gap"] < 1e-5
    for loss_agg, total in (("sequence", 1.0), ("constant", own / 36 / 43)):
        config = Config(loss_agg=loss_agg, max_completion_tokens=43, tokens_per_micro_batch=400)
        weights = [m.weights.sum() for m in grpo.make_micro_batches(rollouts, config, CPU)]
        assert float(sum(weights)) == pytest.approx(total, rel=1e-5)
    for m in (model, plain):
        m.zero_grad()


def test_limits_count_replies_and_the_length_reward_does_not():
    make = lambda n, given, stopped: Rollout(
        [3],
        [20],
        ids=[5] * n,
        given=list(range(given)),
        correct=True,
        well_formed=True,
        stopped=stopped,
    )
    rollouts = [make(18, 10, True), make(8, 0, True), make(10, 0, True), make(20, 12, False)]
    config = Config(plans=2, cots=2, overlong_buffer=4, max_completion_tokens=20, max_plan_tokens=4)
    rewards = grpo.group_rewards([Group({}, rollouts)], config)
    assert rewards["lengths"].flatten().tolist() == [8, 8, 10, 8]
    assert rewards["overlong"].flatten().tolist() == [-0.5, 0.0, 0.0, -1.0]
    length = rewards["length"].flatten().tolist()
    assert length[0] == length[1] == length[3] == pytest.approx(0.1)
    assert length[2] == pytest.approx(0.1 / 2.718281828)
    metrics = call_metrics([Group({}, rollouts)], CPU)
    assert metrics == {}  # no call was answered
    rollouts[0].calls = 2
    assert call_metrics([Group({}, rollouts)], CPU)["given_tokens"] == 22 / 4


# --------------------------------------------------------------------------------------------------
# Calls in a text, and replies as tokens


def test_calls_are_found_after_the_plan_and_before_the_end_of_thinking():
    tools = ("calculator", "act")
    one = "<calculator> 1 + 1 </calculator>"
    assert find_calls(f"<plan>{one}</plan><think>{one} <act>go</act>", tools) == [
        ("calculator", "1 + 1"),
        ("act", "go"),
    ]
    assert find_calls(f"<plan>{one}", tools) == []
    assert find_calls(f"<think> {one} </think> {one}", tools) == [("calculator", "1 + 1")]
    assert find_calls(f"<python>print('{one}')</python>", ("python",)) == [
        ("python", f"print('{one}')")
    ]
    # What was asked before a plan stays asked: the world must not begin again.
    peek = f"<act>B</act> <plan>{one}</plan> <think><act>C</act></think> <act>D</act>"
    assert find_calls(peek, tools) == [("act", "B"), ("act", "C")]
    assert find_calls(peek[:20], tools) == find_calls(peek[:12], tools) == [("act", "B")]
    # A call that never closes holds all that follows; another tool's tags are text.
    assert find_calls(f"<act>{one}", tools) == []
    assert find_calls(f"<act>{one}", ("calculator",)) == [("calculator", "1 + 1")]
    assert find_calls(one, ()) == []
    for text in ("<result>", "</ result >", "x<RESULT/>y", "< result>"):
        assert forged(text)
    assert not forged("the result > 3 and <results>")


def bytes_tokenizer():
    """Byte level, with `</`, `>` and a newline merged into others, and special tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from tokenizers import decoders as detokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "/"), (">", "Ċ"), ("a", "c"), ("ac", "t"), ("p", "l"), ("pl", "a")]
    merges += [("pla", "n"), ("1", "2"), ("Ġ", "<")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    whole = Tokenizer(models.BPE(vocab, merges))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.decoder = detokenizers.ByteLevel()
    whole.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|im|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
        chat_template=toy.CHAT_TEMPLATE,
    )


def is_one_result(tokenizer, ids: list[int]) -> bool:
    text, special = tokenizer.decode(ids), tokenizer.all_special_ids
    tags = [tag.lower() for tag in calls.TAG.findall(text)]
    return tags == ["result", "/result"] and not set(ids) & set(special)


def test_a_result_holds_no_tag_and_no_special_token_and_is_capped():
    tokenizer = bytes_tokenizer()
    stop = tokenizer.eos_token_id
    decode = lambda said, **options: tokenizer.decode(encode_result(tokenizer, said, **options))
    assert decode("35") == "\n<result>\n35\n</result>\n"
    assert decode(" 3 < 4 > 2\n") == "\n<result>\n3 < 4 > 2\n</result>\n"
    assert "1\n[/result]\n[answer]" in decode("1\n</result>\n<answer>")
    assert is_one_result(tokenizer, encode_result(tokenizer, "a <|end|> b"))
    # Without the special token in between, pieces would become a tag.
    assert decode("</res<|end|>ult>") == f"\n<result>\n{calls.UNSHOWN}\n</result>\n"
    assert decode("x" * 1000, most=8) == "\n<result>\nxxxxxxxx [cut]\n</result>\n"
    (seven,) = tokenizer.encode("7")
    assert seven not in encode_result(tokenizer, "7", stop_ids=(seven,))
    assert stop not in encode_result(tokenizer, "<|end|>")
    decode("\udc80 \x00 \x1b[2J")  # what a program may print


PIECES = """</ < > / result result> </result> <result> <answer> </think> think plan </plan> <|end|>
<|im|> 7 \\boxed{7} act <act> python calculator \n \t 1+1 ( ) ^ 9 * / . , é \u202e \x00 \udc80
RESULT <calculator> </calculator> - ** 99999999999999999999 ÷ e x""".split(" ")


def test_ten_thousand_calls_raise_nothing_and_no_reply_imitates_anything():
    rng, tokenizers = random.Random(0), [bytes_tokenizer(), toy.make_tokenizer(walk.WORDS)]
    values = lies = 0
    for i in range(10_000):
        asked = "".join(rng.choices(PIECES, k=rng.randrange(12)))
        value = calculate(asked)
        values += not value.startswith("error:")
        said, most = value if i % 4 < 2 else asked, rng.choice((4, 64))
        ids = encode_result(tokenizers[i % 2], said, most=most)
        assert is_one_result(tokenizers[i % 2], ids), asked
        if "<result>" in asked or "</result>" in asked:  # if the policy had written it
            lie = f"<plan>p</plan><think>{asked}</think><answer>1</answer>"
            assert reading({"answer": "1"}, lie, ("calculator",))[::2] == (None, True)
            lies += 1
    assert values > 100 and lies > 1000


# --------------------------------------------------------------------------------------------------
# Tools


def random_expression(rng: random.Random, depth: int) -> tuple[str, Fraction | None]:
    """An expression and its value by Python's own fractions; None where it has none."""
    if depth == 0 or rng.random() < 0.2:
        text = rng.choice(("0", "1", "7", "12", "3.25", ".5", "1,024"))
        return text, Fraction(text.replace(",", ""))
    if rng.random() < 0.2:
        text, value = random_expression(rng, depth - 1)
        return f"-({text})", value if value is None else -value
    (a, x), (b, y) = (random_expression(rng, depth - 1) for _ in range(2))
    sign = rng.choice("+-*/^")
    if sign == "^":
        b, y = rng.choice((("3", Fraction(3)), ("0", Fraction(0)), ("-1", Fraction(-1))))
    text = f"({a}) {sign} ({b})"
    if x is None or y is None or sign in "/^" and not (y if sign == "/" else x or y >= 0):
        return text, None
    by_hand = {
        "+": lambda: x + y,
        "-": lambda: x - y,
        "*": lambda: x * y,
        "/": lambda: x / y,
        "^": lambda: x ** int(y),
    }
    return text, by_hand[sign]()


def test_the_calculator_is_exact():
    known = {
        "1 + 2 * 3": "7",
        "-2^2": "-4",
        "2^3^2": "512",
        "(1/3 + 1/6) * 4": "2",
        "1/8": "0.125",
        "7/3": "7/3",
        "2^-3": "0.125",
        "3 × 4 ÷ 6 − 1": "1",
        "(-1)^1000000000001": "-1",
        "--3": "3",
        "0.1 + 0.2": "0.3",
        "1,000 * 2": "2000",
        "-1/4": "-0.25",
        "2 ** 10": "1024",
    }
    assert {text: calculate(text) for text in known} == known
    wrongs = ["1/0", "2(3)", "", "1 +", "(1", "1)", "1e5", "9^9^9", "x", "__import__('os')"]
    wrongs += ["2^0.5", "(" * 300 + "1" + ")" * 99, "-" * 200 + "1", "9" * 399 + "*", "٣ + 1"]
    for wrong in wrongs:
        assert calculate(wrong).startswith("error: "), wrong
    rng, valued = random.Random(1), 0
    for _ in range(500):
        text, value = random_expression(rng, 3)
        said = calculate(text)
        if len(text) <= 400 and not said.startswith("error: the number is too large"):
            assert (None if said.startswith("error:") else Fraction(said)) == value, text
            valued += value is not None
    assert valued > 300


def test_python_calls_are_run_side_by_side_and_say_why_they_fail():
    programs = [
        "print(2**70)",
        "1/0",
        "while True: pass",
        "```python\nprint('a')\n```",
        "x = 1",
        "open('/etc/passwd')",
        "print(2**70)",
        "if",
        "import sys; sys.exit('no')",
        "\0",
    ]
    said = calls.said_by_python(programs)
    assert said[0] == said[6] == "1180591620717411303424" and said[3] == "a"
    assert said[1] == "ZeroDivisionError: division by zero"
    assert said[2] == "error: more than 2 seconds" and said[4] == "(nothing printed)"
    assert said[5].startswith("PermissionError") and said[7].startswith("SyntaxError")
    assert said[9] == "error: it cannot be run"
    assert calls.said_by_python([]) == []


# --------------------------------------------------------------------------------------------------
# The loop with a scripted policy: words come from a function of the text so far


@pytest.fixture
def scripted(monkeypatch):
    """scripted(tokenizer, policy) -> a model whose next token is that of policy(text)."""

    def make(tokenizer, policy):
        def step(self, active):
            logits = torch.full((len(active), len(tokenizer)), -50.0)
            for row, s in enumerate(active):
                (token,) = tokenizer.encode(
                    policy(tokenizer.decode(s.ids)), add_special_tokens=False
                )
                logits[row, token] = 50.0
            return logits

        monkeypatch.setattr(decoder.Decoder, "step", step)
        return use_attention(make_tiny("qwen2", vocab_size=len(tokenizer)))

    return make


PROBLEM = "A3 B9 C5 ; D7 E2 F4 ; G1 H6 I8 ; ?"
RECORD = {"id": "w", "problem": PROBLEM, "answer": "through", "world": walk.WORLD}
PLAN = f"<plan> {doors.plan_of(PROBLEM, 'B E I')} </plan>"


def walker(text: str) -> str:
    """Plans B E I; takes another door where one is shut; ends with what it has reached."""
    said = [word for word in text.split() if word in ("open", "shut")]
    words, passed = f"{PLAN} <think>".split(), 0
    for reply in [*said, "?"][:4]:  # what is sampled in place of the last reply does not matter
        if passed < 3:
            second = len(said) > 0 and words[-2:] == ["shut", "</result>"]
            words += ["<act>", ("BEI"[passed], "CDH"[passed])[second], "</act>"]
            words += ["<result>", reply, "</result>"]
            passed += reply == "open"
    ending = "through" if passed == 3 else "stuck"
    words += f"</think> <answer> \\boxed{{ {ending} }} </answer> <|end|>".split()
    return words[len(text.split())]


def grown(scripted, tokenizer, policy, record, salt="s", **settings):
    """Graded groups of one question under a scripted policy."""
    record = {**record, "prompt": encode_prompt(tokenizer, record["problem"])}
    config = Config(
        **{**dict(plans=2, cots=6, max_plan_tokens=30, max_completion_tokens=70), **settings}
    )
    marks = grpo.plan_marks(tokenizer)
    model = scripted(tokenizer, policy)
    options = dict(plan_opened=marks[0], plan_closed=marks[1], stop_ids=[tokenizer.eos_token_id])
    options["respond"] = replies(
        tokenizer, [record], config, options["stop_ids"], lambda number: f"{salt} {number}"
    )
    trees = grpo.sample_tree(model, [record["prompt"]], config, seed=0, **options)
    groups = [Group(record, tree) for tree in trees]
    grpo.grade_groups(tokenizer, groups, options["stop_ids"], salt=salt, tools=config.tools)
    return groups


def test_every_cot_walks_in_a_world_of_its_own_and_the_judge_replays_it(scripted):
    tokenizer = toy.make_tokenizer(walk.WORDS)
    rollouts = grown(scripted, tokenizer, walker, RECORD)[0].rollouts
    endings = set()
    for i, r in enumerate(rollouts):
        asked = [action for _, action in find_calls(r.text, ("act",))]
        said = [w for w in r.text.split() if w in ("open", "shut")]
        replayed = [walk.play(RECORD, asked[: k + 1], None, f"s {i}")[0] for k in range(len(asked))]
        assert said == replayed and r.calls == len(asked) and len(r.given) == 3 * len(asked)
        assert r.correct == (said.count("open") == 3) and r.well_formed and not r.forged
        # The plan was wrong where one of its doors was shut, and then the walker left it.
        shut = not walk.play(RECORD, ["B", "E", "I"], "through", f"s {i}")[1]
        assert r.revision == (shut, shut)
        endings.add((shut, r.correct))
    assert endings >= {(True, False), (False, True)}
    again = grown(scripted, tokenizer, walker, RECORD, rollout_rows=3)[0].rollouts
    assert [r.text for r in again] == [r.text for r in rollouts]  # waiting changes nothing
    metrics = call_metrics([Group(RECORD, rollouts)], CPU)
    assert metrics["forged"] == 0 and metrics["wrong_left"] == 1 and metrics["calls"] > 3


def test_a_policy_that_babbles_is_answered_where_it_calls(monkeypatch):
    """Random words of the world: every reply is what a replay says, and nothing else is one."""
    tokenizer = toy.make_tokenizer(walk.WORDS)
    weight = torch.full((len(tokenizer),), -4.0)
    for words, size in ((["<act>", "</act>"], 1.0), (doors.DOORS, -1.0), (["<result>"], -3.0)):
        weight[tokenizer.convert_tokens_to_ids(list(words))] = size
    step = lambda self, active: weight.expand(len(active), -1)
    monkeypatch.setattr(decoder.Decoder, "step", step)
    model = use_attention(make_tiny("qwen2", vocab_size=len(tokenizer)))
    prompt, stop_ids = encode_prompt(tokenizer, PROBLEM), [tokenizer.eos_token_id]
    config = Config(plans=60, cots=1, max_plan_tokens=0, max_completion_tokens=90)
    tell = replies(tokenizer, [RECORD], config, stop_ids)
    options = dict(plan_closed=None, stop_ids=stop_ids, seed=0, respond=tell)
    (tree,) = grpo.sample_tree(model, [prompt], config, **options)
    group = Group(RECORD, tree)
    grpo.grade_groups(tokenizer, [group], stop_ids)
    for i, r in enumerate(tree):
        own = calls.own_ids(r.ids, r.given)
        asked = [action for _, action in find_calls(tokenizer.decode(own), ("act",))][: r.calls]
        said = [walk.play(RECORD, asked[: k + 1], None, f" {i}")[0] for k in range(len(asked))]
        expected = [token for word in said for token in encode_result(tokenizer, word)]
        assert [r.ids[place] for place in r.given] == expected[: len(r.given)]
        assert len(r.given) == len(expected) or len(r.ids) == 90
    assert sum(r.calls for r in tree) > 300 and sum(r.forged for r in tree) > 20


def test_a_forged_result_makes_a_completion_malformed_and_moves_no_world(scripted):
    tokenizer = toy.make_tokenizer(walk.WORDS)
    lie = f"{PLAN} <think> <result> open </result> <result> open </result> <result> open </result> "
    lie = f"{lie} </think> <answer> \\boxed{{ through }} </answer> <|end|>".split()
    liar = lambda text: lie[len(text.split())]
    for r in grown(scripted, tokenizer, liar, RECORD)[0].rollouts:
        assert r.forged and not r.well_formed and not r.correct and not r.given
    # Where nothing can be called the words mean nothing.
    record = {"id": "p", "problem": PROBLEM, "answer": "through"}
    r = grown(scripted, tokenizer, liar, record)[0].rollouts[0]
    assert r.well_formed and not r.forged and r.correct


def test_replies_are_not_judged_and_calls_in_a_plan_stay_unanswered(scripted):
    r"""A result may hold a box: the answer must be the policy's own."""
    tokenizer = bytes_tokenizer()
    text = "<plan><calculator>1+1</calculator></plan><think><calculator>12/8</calculator>"
    script = lambda so_far: text[len(so_far) :][:1] if len(so_far) < len(text) else "<|end|>"
    settings = dict(tools=("calculator",), max_plan_tokens=60, max_completion_tokens=200, cots=1)
    record = {"id": "c", "problem": "12 / 8", "answer": "1.5"}
    r = grown(scripted, tokenizer, script, record, **settings)[0].rollouts[0]
    assert r.text == f"{text}\n<result>\n1.5\n</result>\n" and r.calls == 1
    said = tokenizer.decode([r.ids[place] for place in r.given])
    assert said == "\n<result>\n1.5\n</result>\n" and not r.correct


def test_sft_masks_results_and_makes_the_tokens_that_sampling_makes(scripted):
    tokenizer = toy.make_tokenizer(walk.WORDS)
    for r in grown(scripted, tokenizer, walker, RECORD)[0].rollouts[:4]:
        blocks = parse_completion(r.text)
        ending = blocks.answer.removeprefix("\\boxed{").removesuffix("}").strip()
        record = {**RECORD, "plan": blocks.plan, "think": blocks.think, "answer": ending}
        ids, prompt, said = encode_record(tokenizer, record, use_plan=True)
        assert ids[prompt:] == r.ids and [place - prompt for place in said] == r.given
    model = shard_model(make_tiny("qwen2", vocab_size=len(tokenizer)))
    rows = [(ids, prompt, said), (ids[: prompt + 9], prompt, [])]
    assert count_tokens(rows) == len(ids) - prompt - len(said) + 9
    expected = 0.0
    for row, prompt, given in rows:
        logprobs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        places = [k for k in range(prompt, len(row)) if k not in given]
        wanted = sum(float(logprobs[k - 1, row[k]].detach()) for k in places)
        expected -= wanted / count_tokens(rows)
    assert sft_loss(model, rows, SftConfig(), train=False) == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Plans that are left


def test_revisions_are_counted_by_hand():
    seen = [((True, True), True), ((True, True), False), ((True, False), False), (None, True)]
    seen += [((False, True), True), ((False, False), True), ((False, False), False)]
    assert count(seen) == [6, 3, 2, 1, 1]
    figures = shares(count(seen))
    assert figures == {
        "plan_wrong": 1 / 2,
        "wrong_left": 2 / 3,
        "left_right": 1 / 2,
        "good_left": 1 / 3,
    }
    assert shares([0, 0, 0, 0, 0]) == {}
    assert shares([2, 0, 0, 0, 1]) == {"plan_wrong": 0.0, "good_left": 0.5}


def test_the_log_and_the_page_tell_replies_from_the_policys_own_words(scripted):
    tokenizer = toy.make_tokenizer(walk.WORDS)
    (group,) = grown(scripted, tokenizer, walker, RECORD)
    config = Config(plans=2, cots=6, kl_coef=0.0)
    model = shard_model(make_tiny("qwen2", vocab_size=len(tokenizer)))
    micros = grpo.make_micro_batches(group.rollouts, config, CPU)
    grpo.update(model, torch.optim.SGD(model.parameters(), 0.0), micros, config, 0.0)
    rewards = grpo.group_rewards([group], config)
    (record,) = rollout_records([group], rewards, [micros], tokenizer, 1)
    completions = [c for plan in record["plans"] for c in plan["completions"]]
    for r, c in zip(group.rollouts, completions, strict=True):
        pieces = [r.text[a:b].split() for a, b in c["said"]]
        assert [p[1] for p in pieces] == [w for w in r.text.split() if w in ("open", "shut")]
        assert all(p[0] == "<result>" and p[2] == "</result>" and len(p) == 3 for p in pieces)
        assert c["forged"] is False and list(c["revision"]) == list(r.revision)
        for name in ("surprise", "entropy"):
            figures = c["per_token"][name]
            assert [k for k, x in enumerate(figures) if x is None] == r.given
            assert len(figures) == len(r.ids)


@pytest.mark.parametrize("given", [False, True])
def test_eval_answers_calls_and_judges_the_same_worlds(given, scripted, monkeypatch):
    """Also where the plan is given: places and worlds count from the completion's beginning."""
    tokenizer = toy.make_tokenizer(walk.WORDS)
    start = f"{PLAN} <think>" if given else ""
    model = scripted(tokenizer, lambda text: walker(f"{start} {text}"))
    opening = tokenizer.encode(start, add_special_tokens=False) if given else []
    prompt = encode_prompt(tokenizer, PROBLEM, tools=("act",))
    problems = [{**RECORD, "benchmark": "b", "prompt": prompt, "given": opening}] * 2
    limits = dict(max_plan_tokens=30, max_completion_tokens=70)
    config = evaluation.Config(n=4, plan="x" * given, temperature=1.0, top_p=1.0, seed=7, **limits)
    monkeypatch.setattr(evaluation, "find_stop_ids", lambda *args: [tokenizer.eos_token_id])
    first, second = evaluation.evaluate(model, tokenizer, problems, config, seed=0)
    assert first["samples"] == second["samples"]  # sample i meets world i
    assert len({s["completion"] for s in first["samples"]}) > 1
    for i, s in enumerate(first["samples"]):
        asked = [action for _, action in find_calls(s["completion"], ("act",))]
        assert s["correct"] == walk.play(RECORD, asked, "through", f"7 {i}")[1] and s["well_formed"]
        said = [s["completion"][a:b].split()[1] for a, b in s["said"]]
        assert said == [
            walk.play(RECORD, asked[: k + 1], None, f"7 {i}")[0] for k in range(len(asked))
        ]
        assert s["tokens"] == len(s["completion"].split()) + 1 - 3 * len(asked)
        assert json.loads(json.dumps(s)) == {**s, "revision": list(s["revision"])}
    summary = evaluation.summarise([first, second])
    assert summary["revisions"] == 8 and summary["good_left"] == 0
    assert summary["wrong_left"] == 1 and "8 samples" in revision_text(summary)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(tools=("calculator", "shell")), "--tools knows calculator and python, not"),
        (dict(tools=("python",), tp=2), "--tp samples without tools"),
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_sentence(flags, message, monkeypatch):
    monkeypatch.setattr(grpo, "check_tp", lambda config: None)
    with pytest.raises(SystemExit, match=message):
        Config(**flags).check()


def test_the_prompt_explains_calls_only_where_there_are_any():
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text = lambda *tools: tokenizer.decode(encode_prompt(tokenizer, "1 + 1", tools=tools))
    assert text() == f"{INSTRUCTION}1 + 1"
    assert text("calculator").startswith(f"{INSTRUCTION} Between <think> and </think> you may")
    assert "<calculator>" in text("calculator") and "<python>" not in text("calculator")
    assert "<act>ACTION</act>" in text("python", "act")
