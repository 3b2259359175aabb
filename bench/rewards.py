r"""Grading under load: how long a step's answers take, what hostile ones cost, and whether fuzzing breaks
anything.

    python -m bench.rewards            about two minutes on 2 cores; prints one table, writes nothing

Figures to reach: 1,536 typical answers (128 questions x 12) in 1 s after warm-up, in 15 s with 5 % hostile
ones; each hostile answer alone in 2 s and 1 GiB; 20,000 fuzzed completions without exception, file or process
left behind.
"""

import os
import platform
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

import grader
import rewards

QUESTIONS, SAMPLES = 128, 12

# (share of questions, gold, right spellings, wrong answers); numbers are drawn anew for each question, so
# that nothing is known from an earlier batch. The shares follow the public sets: most answers are plain
# numbers.
KINDS = [
    (45, "{a}", ["{a}", "{a}", "{a}.", "{a}.0", "x = {a}", r"{a}\text{{ cm}}"], ["{b}", "-{a}", "{a}{b}"]),
    (12, r"\frac{{{a}}}{{{p}}}", [r"\frac{{{a}}}{{{p}}}", "{a}/{p}", r"\dfrac{{{a}}}{{{p}}}"],
     [r"\frac{{{b}}}{{{p}}}", "{b}", r"\frac{{{p}}}{{{a}}}"]),
    (5, "{a}.{b}", ["{a}.{b}", "{a}.{b}0"], ["{a}", "{b}.{a}"]),
    (4, r"{a}\%", [r"{a}\%", "{a}", "{a}%"], [r"{b}\%"]),
    (5, "B", ["B", "(B)", r"\text{{B}}"], ["A", "(C)", r"\text{{D}}"]),
    (5, r"\text{{Yes}}", ["Yes", r"\text{{yes}}", "yes"], ["No", r"\text{{no}}"]),
    (6, r"{a}\sqrt{{{p}}}", [r"{a}\sqrt{{{p}}}", r"{a} \sqrt{{{p}}}", r"\sqrt{{{p}}} \cdot {a}"],
     [r"{b}\sqrt{{{p}}}", r"\sqrt{{{p}}}", "{b}"]),
    (3, r"\frac{{{a}\pi}}{{{p}}}", [r"\frac{{{a}\pi}}{{{p}}}", r"\frac{{{a}}}{{{p}}}\pi"],
     [r"{a}\pi", r"\frac{{\pi}}{{{p}}}"]),
    (5, "x^2+{a}x-{b}", ["x^2+{a}x-{b}", "x^2 + {a}x - {b}", "-{b}+{a}x+x^2"], ["x^2+{b}x-{a}", "x^2-{a}x"]),
    (2, "y={a}x+{b}", ["y={a}x+{b}", "y = {a}x + {b}", "{a}x+{b}"], ["y={b}x+{a}"]),
    (4, "({a},{b})", ["({a},{b})", "({a}, {b})", r"\left({a}, {b}\right)"], ["({b},{a})", "({a},{p})"]),
    (2, r"[{a},\infty)", [r"[{a},\infty)", r"[{a}, \infty)"], [r"({a},\infty)"]),
    (2, r"\{{{a},{b},{p}\}}", [r"\{{{a},{b},{p}\}}", "{b}, {a}, {p}"], [r"\{{{a},{b}\}}"]),
]

# Each a function of i, so that 77 of them in a batch are 77 different answers.
HOSTILE = {
    "power tower, plain": lambda i: f"9**9**9**9**{i}",
    "power tower, LaTeX": lambda i: f"9^{{9^{{9^{{9^{{{i}}}}}}}}}",
    "factorial of a large number": lambda i: f"({10**9 + i})!",
    "factorial of a factorial": lambda i: f"(({i + 20})!)!",
    "binomial of large numbers": lambda i: rf"\binom{{{10**9 + i}}}{{{5 * 10**8}}}",
    "sum to 10^12": lambda i: rf"\sum_{{n=1}}^{{10^{{12}}}} \frac{{1}}{{n^{{{i + 2}}}+1}}",
    "product to 10^12": lambda i: rf"\prod_{{n=1}}^{{10^{{12}}}} (n+{i})",
    "expansion of a large power": lambda i: f"(x+y+z+{i})^{{10000}}-(x+y+z)^{{9999}}",
    "hard integral": lambda i: rf"\int_0^{{{i + 1}}} \frac{{\sin(x^x)}}{{\ln(x+2)}} dx",
    "20,000 nested braces": lambda i: "{" * 20_000 + f"{i}" + "}" * 20_000,
    "20 nested braces": lambda i: "{" * 20 + f"{i}x" + "}" * 20,
    "800 nested fractions": lambda i: r"\frac{1}{" * 800 + f"{i}" + "}" * 800,
    "20 nested fractions": lambda i: r"\frac{1}{x+" * 20 + f"{i}" + "}" * 20,
    "a set of 20,000 numbers": lambda i: r"\{" + ",".join(str(n + i) for n in range(20_000)) + r"\}",
    "a set of 400 numbers": lambda i: r"\{" + ",".join(str(n + i) for n in range(400)) + r"\}",
    "200,000 digits": lambda i: "7" * 200_000 + str(i),
    "1 MB of text": lambda i: "the answer " * 95_000 + str(i),
    "2,000 characters of brackets": lambda i: "([{" * 8 + f"{i}" + "x(" * 900,
    "null bytes": lambda i: f"7\x00{i}",
    "right-to-left marks": lambda i: f"\u202e{i}7\u202c",
    "lone surrogates": lambda i: f"\ud800{i}",
    "code that writes a file": lambda i: f"__import__('pathlib').Path('{MARK}').write_text('{i}')",
    "code in LaTeX text": lambda i: rf"\text{{__import__('os').system('touch {MARK}')}}{i}",
}
MARK = os.path.join(tempfile.gettempdir(), f"bench_rewards_{os.getpid()}")


def typical(seed: int) -> tuple[list[str], list[str | None]]:
    """A step's golds and answers: 12 a question, 55 % right in several spellings, 5 % missing."""
    rng = random.Random(seed)
    golds, answers = [], []
    for _ in range(QUESTIONS):
        _, gold, right, wrong = rng.choices(KINDS, [kind[0] for kind in KINDS])[0]
        numbers = {"a": rng.randint(11, 99), "b": rng.randint(100, 999), "p": rng.choice([3, 5, 7, 11, 13])}
        for _ in range(SAMPLES):
            draw = rng.random()
            form = None if draw < 0.05 else rng.choice(right if draw < 0.6 else wrong)
            golds.append(gold.format(**numbers))
            answers.append(form and form.format(**numbers))
    return golds, answers


def with_hostile(seed: int, share: float = 0.05) -> tuple[list[str], list[str | None]]:
    golds, answers = typical(seed)
    kinds = list(HOSTILE.values())
    for k, i in enumerate(random.Random(seed).sample(range(len(golds)), round(share * len(golds)))):
        golds[i], answers[i] = r"\sqrt{2}", kinds[k % len(kinds)](k)
    return golds, answers


def fuzzed(count: int, seed: int = 0):
    """Mutations of well-formed completions (half) and strings over the template's and LaTeX's own
    vocabulary.
    """
    rng = random.Random(seed)
    latex = r"\boxed{ \fbox{ \frac \sqrt \pi \text{ \infty \cup \sum \int \left \begin{matrix} \end{matrix}"
    words = [*rewards.TEMPLATE, "<PLAN>", *latex.split(), *"^_{}()[]$\\&=<>,;%7x!é∞１", "**", " ", "\n",
             "\x00", "\u202e", "\ud800"]
    seeds = [rewards.build_completion("split, then add", "2 + 5 = 7", answer)
             for answer in ["7", r"\frac{1}{2}", r"(1,2]\cup\{3\}", "x^2+1", r"\text{no}", "1,2,3"]]
    for n in range(count):
        if n % 2:
            yield "".join(rng.choices(words, k=rng.randint(0, 25)))
            continue
        text = list(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(text) + 1)
            new = rng.choice([rng.choice(words), rng.choice(string.printable), ""])
            text[at:at + rng.choice([0, 0, 1, 3])] = new
        yield "".join(text)


def timed(golds, answers):
    start = time.perf_counter()
    verdicts = rewards.grade(golds, answers)
    return time.perf_counter() - start, verdicts


def worker_count() -> int:
    listing = subprocess.run(["ps", "-A", "-o", "ppid="], capture_output=True, text=True).stdout.split()
    return listing.count(str(os.getpid())) - 1  # less ps itself


def main():
    os.chdir(tempfile.mkdtemp())  # an empty folder, so that a file written by an answer shows
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          + ", ".join(f"{name} {version(name)}" for name in ("math-verify", "sympy")))
    start = time.perf_counter()
    rewards.answers_equal("x+1", "1+x")
    rows = [("start of the workers", time.perf_counter() - start, "")]

    for seed in (1, 2, 3):  # warm-up
        timed(*typical(seed))
    rewards.grader_stats(reset=True)
    times = [timed(*typical(seed))[0] for seed in range(10, 15)]
    stats = rewards.grader_stats(reset=True)
    rows.append(("1,536 typical answers, median of 5", sorted(times)[2],
                 f"worst {max(times):.2f} s; {stats['judged'] // 5} distinct pairs a batch to math-verify"))

    golds, answers = with_hostile(20)
    plain_golds, plain = typical(20)
    rewards.grade(plain_golds, plain)
    rewards.grader_stats(reset=True)
    grader.pool.verdicts.clear()
    seconds, verdicts = timed(golds, answers)
    stats = rewards.grader_stats(reset=True)
    expected = rewards.grade(plain_golds, plain)
    spoilt = sum(v != e for v, e, a, b in zip(verdicts, expected, answers, plain) if a is b or a == b)
    rows.append(("1,536 with 5 % hostile", seconds,
                 ", ".join(f"{name} {stats[name]}" for name in ("timeouts", "worker_deaths", "over_budget"))
                 + f", refused {stats['refused']}; honest verdicts changed: {spoilt}"))

    worst, peak = 0.0, 0
    for name, make in HOSTILE.items():
        rewards.grader_stats(reset=True)
        seconds, verdicts = timed([r"\sqrt{2}"], [make(999)])
        stats = rewards.grader_stats(reset=True)
        worst, peak = max(worst, seconds), max(peak, stats["peak_mb"])
        hidden = ("graded", "peak_mb", "judged")
        seen = {key: value for key, value in stats.items() if value and key not in hidden}
        rows.append((f"  {name}", seconds, f"{verdicts[0]}, {stats['peak_mb']} MiB, {seen}"))
    rows.append(("hostile alone, worst", worst, f"{peak} MiB"))

    outcomes, start = {"well-formed": 0, "with an answer": 0, "right": 0}, time.perf_counter()
    texts = list(fuzzed(20_000))
    parsed = [rewards.parse_completion(text) for text in texts]
    found = [rewards.extract_answer(text) for text in texts]
    rewards.grader_stats(reset=True)
    for i in range(0, len(texts), 2_000):
        golds = ["7", r"\frac{1}{2}", "x^2+1", r"\text{no}"] * 500
        outcomes["right"] += sum(rewards.grade(golds, found[i:i + 2_000]))
        for plan, answer in zip(parsed[i:i + 2_000], golds):
            rewards.plan_leaks(plan.plan if plan else texts[i], answer)
    outcomes["well-formed"], outcomes["with an answer"] = sum(map(bool, parsed)), sum(map(bool, found))
    stats = {key: value for key, value in rewards.grader_stats().items() if value}
    rows.append(("20,000 fuzzed completions", time.perf_counter() - start, f"{outcomes}, {stats}"))

    for name, seconds, note in rows:
        print(f"{name:38} {seconds:8.3f} s   {note}")
    workers = len(grader.pool.workers)
    assert worker_count() == workers, "a process was left behind"
    grader.pool.drop(*grader.pool.workers)
    assert worker_count() == 0, "a process was left behind"
    assert not os.listdir() and not os.path.exists(MARK), "a file was written"
    peak = grader.mebibytes(resource.getrusage(resource.RUSAGE_SELF))
    print(f"no file written, no process left; the caller's peak {peak} MiB")


if __name__ == "__main__":
    sys.exit(main())
