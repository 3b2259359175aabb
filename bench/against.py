"""Our sides of bench.speed's rows, this checkout against an older one: median ratio of the rounds.

    git worktree add --detach /tmp/old COMMIT
    python -m bench.against /tmp/old               rollout, tree, share and growth, on the toy model
    python -m bench.against /tmp/old tree share    some of them

Both checkouts run at the same time, in a process each, and take turns: while one works, the other
waits. So a machine whose speed changes from minute to minute is the same for both. Each has its own
defaults for threads; what you set (OMP_WAIT_POLICY, OMP_NUM_THREADS) holds for both.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from plumbing.ranks import fail, require

ROWS = ("rollout", "tree", "share", "growth")
PEERS = ("generate", "plain", "8 x in waves of 192")  # sides that are not ours, or not the default
# Runs a checkout's bench.speed, but for each round of each side waits to be told.
WORKER = """
import argparse, sys, time, warnings
sys.path.insert(0, "")
warnings.filterwarnings("ignore")
answers, sys.stdout = sys.stdout, sys.stderr
from bench import speed

def alternate(sides, rounds):
    for name, run in sides.items():
        print("side", name, file=answers, flush=True)
        while sys.stdin.readline() == "go\\n":
            began = time.perf_counter()
            run()
            print(time.perf_counter() - began, file=answers, flush=True)
    return dict.fromkeys(sides, 1.0)

speed.alternate = alternate
bench = speed.Bench(argparse.Namespace(rounds=1, model="toy", memory=None))
for row in sys.argv[1:]:
    getattr(bench, row)()
print("end", file=answers, flush=True)
"""


class Checkout:
    """A process that runs a folder's bench.speed in steps."""

    def __init__(self, folder: Path, rows: list[str]):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *rows], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.folder = folder

    def read(self) -> str:
        line = self.process.stdout.readline()
        require(line, f"bench.speed of {self.folder} ended early: run it there to see why")
        return line.strip()

    def say(self, word: str):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def run(self) -> float:
        """Seconds of one round of the present side."""
        self.say("go")
        return float(self.read())


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("folder", type=Path, help="the older checkout")
    parser.add_argument("rows", nargs="*", help=f"which of {', '.join(ROWS)}; none: all")
    parser.add_argument("--rounds", type=int, default=20, help="after one that does not count")
    parser.error = fail
    args = parser.parse_args()
    rows = args.rows or list(ROWS)
    require((args.folder / "bench/speed.py").exists(), f"{args.folder} has no bench/speed.py")
    require(set(rows) <= set(ROWS), f"rows are {', '.join(ROWS)}")
    now, then = Checkout(Path.cwd(), rows), Checkout(args.folder, rows)
    while (side := now.read()) != "end":
        require(then.read() == side, f"the rows of {args.folder} have other sides")
        if side.removeprefix("side ") not in PEERS:
            pairs = []
            for round_ in range(args.rounds + 1):
                order = (now, then) if round_ % 2 else (then, now)  # neither is always the second
                seconds = {checkout: checkout.run() for checkout in order}
                pairs.append((seconds[now], seconds[then]))
            pairs = pairs[1:]
            ratios = sorted(a / b for a, b in pairs)
            mine, its = (statistics.median(times) for times in zip(*pairs))
            low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
            print(f"{side.removeprefix('side '):10} {mine:7.3f} vs {its:7.3f} s   "
                  f"{statistics.median(ratios):5.2f} (quartiles {low:.2f}, {high:.2f})", flush=True)
        now.say("next")
        then.say("next")


if __name__ == "__main__":
    main()
