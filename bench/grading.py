r"""How long does grading take for a step's answers, for hostile ones and for fuzzed ones?

    python -m bench.grading

This takes about one minute on 2 cores. It prints one table and writes nothing.

Bars: 1,536 typical answers (128 questions x 12) in 1 s once the workers are warm; in 15 s with 5 %
hostile ones among them; each hostile answer alone in 2 s and 1 GiB; and 20,000 fuzzed completions
that raise nothing. No file and no process may be left behind.
"""

import os
import platform
import random
import string
import subprocess
import tempfile
import time
from importlib.metadata import version

from bench.common import peak_mb
from plumbing import grader
from plumbing.answers import answers_equal, grade, grader_stats, plan_leaks
from rewards import TEMPLATE, build_completion, extract_answer, parse_completion

QUESTIONS, SAMPLES = 128, 12
Batch = tuple[list[str], list[str | None]]  # golds and answers
Row = tuple[str, float, str]  # of the table: name, seconds, note


# --------------------------------------------------------------------------------------------------
# Answers

# (share of questions, gold, right spellings, wrong answers). The numbers are drawn anew for each
# question, so that nothing is known from an earlier batch. The shares follow the public sets, where
# most answers are plain numbers.
KINDS = [
    (45, "{a}", ["{a}", "{a}", "{a}.", "{a}.0", "x = {a}", r"{a}\text{{ cm}}"],
     ["{b}", "-{a}", "{a}{b}"]),
    (12, r"\frac{{{a}}}{{{p}}}", [r"\frac{{{a}}}{{{p}}}", "{a}/{p}", r"\dfrac{{{a}}}{{{p}}}"],
     [r"\frac{{{b}}}{{{p}}}", "{b}", r"\frac{{{p}}}{{{a}}}"]),
    (5, "{a}.{b}", ["{a}.{b}", "{a}.{b}0"], ["{a}", "{b}.{a}"]),
    (4, r"{a}\%", [r"{a}\%", "{a}", "{a}%"], [r"{b}\%"]),
    (5, "B", ["B", "(B)", r"\text{{B}}"], ["A", "(C)", r"\text{{D}}"]),
    (5, r"\text{{Yes}}", ["Yes", r"\text{{yes}}", "yes"], ["No", r"\text{{no}}"]),
    (6, r"{a}\sqrt{{{p}}}",
     [r"{a}\sqrt{{{p}}}", r"{a} \sqrt{{{p}}}", r"\sqrt{{{p}}} \cdot {a}"],
     [r"{b}\sqrt{{{p}}}", r"\sqrt{{{p}}}", "{b}"]),
    (3, r"\frac{{{a}\pi}}{{{p}}}", [r"\frac{{{a}\pi}}{{{p}}}", r"\frac{{{a}}}{{{p}}}\pi"],
     [r"{a}\pi", r"\frac{{\pi}}{{{p}}}"]),
    (5, "x^2+{a}x-{b}", ["x^2+{a}x-{b}", "x^2 + {a}x - {b}", "-{b}+{a}x+x^2"],
     ["x^2+{b}x-{a}", "x^2-{a}x"]),
    (2, "y={a}x+{b}", ["y={a}x+{b}", "y = {a}x + {b}", "{a}x+{b}"], ["y={b}x+{a}"]),
    (4, "({a},{b})", ["({a},{b})", "({a}, {b})", r"\left({a}, {b}\right)"],
     ["({b},{a})", "({a},{p})"]),
    (2, r"[{a},\infty)", [r"[{a},\infty)", r"[{a}, \infty)"], [r"({a},\infty)"]),
    (2, r"\{{{a},{b},{p}\}}", [r"\{{{a},{b},{p}\}}", "{b}, {a}, {p}"], [r"\{{{a},{b}\}}"]),
]

MARK = os.path.join(tempfile.gettempdir(), f"bench_grading_{os.getpid()}")


def number_set(numbers: range) -> str:
    return r"\{" + ",".join(map(str, numbers)) + r"\}"


# Each is a function of i, so that 77 of them in a batch are 77 different answers.
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
    "a set of 20,000 numbers": lambda i: number_set(range(i, i + 20_000)),
    "a set of 400 numbers": lambda i: number_set(range(i, i + 400)),
    "200,000 digits": lambda i: "7" * 200_000 + str(i),
    "1 MB of text": lambda i: "the answer " * 95_000 + str(i),
    "2,000 characters of brackets": lambda i: "([{" * 8 + f"{i}" + "x(" * 900,
    "null bytes": lambda i: f"7\x00{i}",
    "right-to-left marks": lambda i: f"\u202e{i}7\u202c",
    "lone surrogates": lambda i: f"\ud800{i}",
    "code that writes a file": lambda i: f"__import__('pathlib').Path('{MARK}').write_text('{i}')",
    "code in LaTeX text": lambda i: rf"\text{{__import__('os').system('touch {MARK}')}}{i}",
}


def typical(seed: int) -> Batch:
    """A step's answers: 12 per question, 55 % right in several spellings, 5 % missing."""
    rng = random.Random(seed)
    golds, answers = [], []
    for _ in range(QUESTIONS):
        _, gold, right, wrong = rng.choices(KINDS, [kind[0] for kind in KINDS])[0]
        a, b, p = rng.randint(11, 99), rng.randint(100, 999), rng.choice([3, 5, 7, 11, 13])
        for _ in range(SAMPLES):
            draw = rng.random()
            form = None if draw < 0.05 else rng.choice(right if draw < 0.6 else wrong)
            golds.append(gold.format(a=a, b=b, p=p))
            answers.append(form and form.format(a=a, b=b, p=p))
    return golds, answers


def with_hostile(seed: int, share: float = 0.05) -> Batch:
    golds, answers = typical(seed)
    kinds, chosen = list(HOSTILE.values()), round(share * len(golds))
    for k, i in enumerate(random.Random(seed).sample(range(len(golds)), chosen)):
        golds[i], answers[i] = r"\sqrt{2}", kinds[k % len(kinds)](k)
    return golds, answers


def fuzzed(count: int, seed: int = 0):
    """Half are mutations of well-formed completions, half strings of template tags and LaTeX."""
    rng = random.Random(seed)
    latex = r"\boxed{ \fbox{ \frac \sqrt \pi \text{ \infty \cup \sum \int \left \begin{matrix}"
    words = [
        *TEMPLATE, "<PLAN>", *latex.split(), r"\end{matrix}", *"^_{}()[]$\\&=<>,;%7x!é∞１", "**",
        " ", "\n", "\x00", "\u202e", "\ud800",
    ]
    answers = ["7", r"\frac{1}{2}", r"(1,2]\cup\{3\}", "x^2+1", r"\text{no}", "1,2,3"]
    seeds = [build_completion("split, then add", "2 + 5 = 7", answer) for answer in answers]
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


# --------------------------------------------------------------------------------------------------
# Measurements


def timed(golds: list[str], answers: list[str | None]) -> tuple[float, list[bool], dict]:
    """Seconds, verdicts and the grader's counts of one batch."""
    grader_stats(reset=True)
    start = time.perf_counter()
    verdicts = grade(golds, answers)
    return time.perf_counter() - start, verdicts, grader_stats(reset=True)


def measure_start() -> Row:
    start = time.perf_counter()
    grader.pool.start()
    at_once = time.perf_counter() - start
    answers_equal("x+1", "1+x")
    note = f"the call that starts them takes {at_once * 1000:.0f} ms"
    return "start of the workers", time.perf_counter() - start, note


def measure_typical() -> Row:
    for seed in (1, 2, 3):  # warm-up
        timed(*typical(seed))
    runs = [timed(*typical(seed)) for seed in range(10, 15)]
    times = sorted(seconds for seconds, _, _ in runs)
    judged = sum(stats["judged"] for _, _, stats in runs) // len(runs)
    note = f"worst {times[-1]:.2f} s; {judged} distinct pairs per batch to math-verify"
    return "1,536 typical answers, median of 5", times[2], note


def measure_mixed() -> Row:
    """Hostile answers must not change the verdicts on honest ones of the same batch."""
    golds, answers = with_hostile(20)
    plain_golds, plain = typical(20)
    expected = grade(plain_golds, plain)
    grader.pool.verdicts.clear()
    seconds, verdicts, stats = timed(golds, answers)
    honest = [i for i in range(len(plain)) if answers[i] == plain[i]]
    changed = sum(verdicts[i] != expected[i] for i in honest)
    counts = [f"{n} {stats[n]}" for n in ("timeouts", "worker_deaths", "over_budget", "refused")]
    note = f"{', '.join(counts)}; honest verdicts changed: {changed}"
    return "1,536 with 5 % hostile", seconds, note


def measure_hostile() -> list[Row]:
    rows, peak = [], 0
    for name, make in HOSTILE.items():
        seconds, verdicts, stats = timed([r"\sqrt{2}"], [make(999)])
        peak = max(peak, stats["peak_mb"])
        hidden = ("graded", "peak_mb", "judged")
        seen = {key: value for key, value in stats.items() if value and key not in hidden}
        rows.append((f"  {name}", seconds, f"{verdicts[0]}, {stats['peak_mb']} MiB, {seen}"))
    worst = max(seconds for _, seconds, _ in rows)
    return [*rows, ("hostile alone, worst", worst, f"{peak} MiB")]


def measure_fuzzed(count: int = 20_000, size: int = 2_000) -> Row:
    grader_stats(reset=True)
    start = time.perf_counter()
    texts = list(fuzzed(count))
    parsed = [parse_completion(text) for text in texts]
    found = [extract_answer(text) for text in texts]
    right, golds = 0, ["7", r"\frac{1}{2}", "x^2+1", r"\text{no}"] * (size // 4)
    for i in range(0, count, size):
        right += sum(grade(golds, found[i:i + size]))
        for text, completion, gold in zip(texts[i:i + size], parsed[i:i + size], golds):
            plan_leaks(completion.plan if completion else text, gold)
    seconds = time.perf_counter() - start
    formed, answered = sum(map(bool, parsed)), sum(map(bool, found))
    stats = {key: value for key, value in grader_stats().items() if value}
    note = f"{formed} well-formed, {answered} with an answer, {right} right; {stats}"
    return "20,000 fuzzed completions", seconds, note


def child_processes() -> int:
    command = ["ps", "-A", "-o", "ppid="]
    listing = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return listing.count(str(os.getpid())) - 1  # without ps itself


def main():
    os.chdir(tempfile.mkdtemp())  # an empty folder: a file that an answer writes shows
    versions = ", ".join(f"{name} {version(name)}" for name in ("math-verify", "sympy"))
    machine = f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, Python {platform.python_version()}, {versions}")
    rows = [measure_start(), measure_typical(), measure_mixed()]
    rows += [*measure_hostile(), measure_fuzzed()]
    for name, seconds, note in rows:
        print(f"{name:38} {seconds:8.3f} s   {note}")
    assert child_processes() == len(grader.pool.workers), "a process was left behind"
    grader.pool.drop(*grader.pool.workers)
    assert child_processes() == 0, "a process was left behind"
    assert not os.listdir() and not os.path.exists(MARK), "a file was written"
    print(f"no file written, no process left; the caller's peak is {peak_mb():.0f} MiB")


if __name__ == "__main__":
    main()
