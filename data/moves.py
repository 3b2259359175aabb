"""Moves: an answer that is a sequence of moves, judged by simulation. The embedded task is a maze.

Cells are A1 to E5. A question names a start, a goal and walls. Any way that ends on the goal, meets
no wall and takes at most MAX_MOVES moves is right, so a question has many right answers.

    problem   from A4 to C2 ; walls A3 B2 D5 E1 E3 ; ?
    plan      via B4 via B3 via C3 via C2               where the way turns, and its end
    CoT       right B4 up B3 right C3 up C2             the plan, carried out
    answer    right up right up

The authors of the training solutions are careless: with probability 1 - CARE they take one of the
two ways with a single turn, and do not look at the walls. Imitation gives a mixture. Reinforcement
learning has to find out which plans meet walls.

    python -m data.moves --out runs/moves      writes sft, train, validation and test.jsonl, and
                                               model/ with random weights
"""

import itertools
import random
import re

from data import toy
from plumbing.ranks import fail
from plumbing.signals import guarded

COLUMNS, ROWS = "ABCDE", "12345"
CELLS = [column + row for row in ROWS for column in COLUMNS]
STEPS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}  # columns, rows
WALLS = 7
CARE = 0.5
MAX_MOVES = 25  # there are 25 cells
WORDS = [*toy.TAGS, "from", "to", "walls", "via", ";", "?", *STEPS, *CELLS]

CELL = "[A-E][1-5]"
PROBLEM = re.compile(rf"from ({CELL}) to ({CELL}) ; walls ({CELL}(?: {CELL})*) ; \?")
MOVE = "(?:" + "|".join(STEPS) + ")"
MOVES = re.compile(rf"{MOVE}(?:[\s,]+{MOVE})*")


# --------------------------------------------------------------------------------------------------
# The world


def world_of(problem: str) -> tuple[str, str, set[str]]:
    """Start, goal and walls. Raises ValueError for any other kind of text."""
    match = PROBLEM.fullmatch(problem.strip())
    if match is None:
        raise ValueError(f"not a problem of the moves task: {problem[:60]!r}")
    return match[1], match[2], set(match[3].split())


def step(cell: str, move: str) -> str | None:
    """The cell that a move leads to, or None if it leaves the maze."""
    column, row = COLUMNS.index(cell[0]) + STEPS[move][0], ROWS.index(cell[1]) + STEPS[move][1]
    inside = 0 <= column < len(COLUMNS) and 0 <= row < len(ROWS)
    return COLUMNS[column] + ROWS[row] if inside else None


def moves_of(answer: str | None) -> list[str] | None:
    """The moves that an answer lists, or None if it is anything else or too long."""
    text = (answer or "").strip().lower()
    if len(text) > 8 * MAX_MOVES or not MOVES.fullmatch(text):
        return None
    moves = re.findall(MOVE, text)
    return moves if len(moves) <= MAX_MOVES else None


def judge(record: dict, answer: str | None) -> bool:
    """Whether the moves lead from the start to the goal, through no wall."""
    (cell, goal, walls), moves = world_of(record["problem"]), moves_of(answer)
    for move in moves or ():
        cell = step(cell, move)
        if cell is None or cell in walls:
            return False
    return bool(moves) and cell == goal


def planned(record: dict, plan: str) -> str:
    """The moves that carry a plan out, from turn to turn. Empty where a leg is not straight."""
    (cell, _, _), moves = world_of(record["problem"]), []
    for turn in re.findall(CELL, plan):
        right = COLUMNS.index(turn[0]) - COLUMNS.index(cell[0])
        down = ROWS.index(turn[1]) - ROWS.index(cell[1])
        if right and down:
            return ""
        moves += ["right" if right > 0 else "left"] * abs(right)
        moves += ["down" if down > 0 else "up"] * abs(down)
        cell = turn
    return " ".join(moves)


def left(planned: str, answer: str) -> bool:
    """Whether an answer is another way than the plan's."""
    return moves_of(answer) != moves_of(planned)


def leaks(record: dict, plan: str) -> bool:
    """Whether a plan spells out moves that are right. The cells of a way are no moves."""
    return any(judge(record, moves) for moves in MOVES.findall(plan.lower()))


def shortest_way(start: str, goal: str, walls: set[str], rng: random.Random) -> list[str] | None:
    """A shortest way, as moves; None if there is none. `rng` chooses among equals."""
    ways, seen = {start: []}, {start}
    while ways and goal not in ways:
        further = {}
        for cell, moves in rng.sample(list(ways.items()), len(ways)):
            for move in rng.sample(list(STEPS), len(STEPS)):
                to = step(cell, move)
                if to and to not in walls | seen:
                    seen.add(to)
                    further[to] = moves + [move]
        ways = further
    return ways.get(goal)


def check(record: dict) -> str | None:
    """Why a record cannot be judged, or None."""
    try:
        start, goal, walls = world_of(record["problem"])
    except ValueError as error:
        return str(error)
    reached = start != goal and shortest_way(start, goal, walls, random.Random(0))
    return None if reached else "no way leads to its goal"


# --------------------------------------------------------------------------------------------------
# Problems


def single_turn(start: str, goal: str, rng: random.Random) -> list[str]:
    """One of the two ways with a single turn, through walls if there are any."""
    columns, rows = (index.index(goal[i]) - index.index(start[i])
                     for i, index in enumerate((COLUMNS, ROWS)))
    legs = [["right" if columns > 0 else "left"] * abs(columns)]
    legs.append(["down" if rows > 0 else "up"] * abs(rows))
    return sum(rng.sample(legs, 2), [])


def walked(start: str, moves: list[str]) -> str:
    """The CoT of a way: each move, and where it leads."""
    cells = itertools.accumulate(moves, step, initial=start)
    return " ".join(f"{move} {cell}" for move, cell in zip(moves, list(cells)[1:]))


def make_problem(rng: random.Random) -> dict | None:
    """One problem record, whose `answer` is right, with the `solution` of a careless author.

    None if no way leads to the goal, or if a straight one might.
    """
    start, goal, *walls = rng.sample(CELLS, 2 + WALLS)
    best = shortest_way(start, goal, set(walls), rng)
    if best is None or start[0] == goal[0] or start[1] == goal[1]:
        return None
    taken = best if rng.random() < CARE else single_turn(start, goal, rng)
    problem = f"from {start} to {goal} ; walls {' '.join(sorted(walls))} ; ?"
    return {"problem": problem, "answer": " ".join(best), "solution": walked(start, taken)}


def make_problems(split: str, count: int, seed: int = 0) -> list[dict]:
    """`count` different problem records of `split`. The same arguments give the same bytes."""
    rng, seen, records = random.Random(f"moves {split} {seed}"), set(), []
    while len(records) < count:
        record = make_problem(rng)
        if not record or toy.split_of(record["problem"]) != split or record["problem"] in seen:
            continue
        seen.add(record["problem"])
        id = f"moves-{split}-{seed}-{len(records)}"
        records.append({"id": id, "verifier": "moves", **record})
    return records


def plan_of(solution: str) -> str:
    """The plan behind a CoT: the cells where the way turns, and its end. ValueError for others."""
    words = solution.split()
    moves, cells = words[0::2], words[1::2]
    if not moves or len(moves) != len(cells) or {*moves} - {*STEPS} or {*cells} - {*CELLS}:
        raise ValueError(f"not a way of the moves task: {solution[:60]!r}")
    turns = [cell for cell, one, next in zip(cells, moves, [*moves[1:], ""]) if one != next]
    return " ".join(f"via {cell}" for cell in turns)


# --------------------------------------------------------------------------------------------------
# Main


def main():
    args = toy.parse_arguments(__doc__)
    try:
        problems = make_problems("train", args.sft + args.train, args.seed)
        files = {"sft": problems[: args.sft], "train": problems[args.sft :]}
        # A record of the cold start answers what its author took.
        for record in files["sft"]:
            record["answer"] = " ".join(record["solution"].split()[0::2])
        for split in ("validation", "test"):
            files[split] = make_problems(split, args.test, args.seed)
    except ValueError as error:
        fail(str(error))
    toy.write_task(args, files, toy.make_tokenizer(WORDS))


if __name__ == "__main__":
    guarded(main)
