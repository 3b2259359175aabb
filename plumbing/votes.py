"""maj@n: equal answers vote together, and the most frequent answer counts."""

import re
from collections import Counter
from collections.abc import Callable

from plumbing import grader
from plumbing.answers import grade

VOTE_ROUNDS = 16  # rounds of comparing wrong answers with each other


def answer_key(answered: dict) -> str | None:
    """What answers of one spelling share: "right", or that spelling; None without an answer."""
    if answered["correct"] or answered["answer"] is None:
        return "right" if answered["correct"] else None
    spelling = re.sub(r"\\left|\\right|\\[,;!: ]|[\s$]", "", answered["answer"])
    return "wrong " + spelling.replace("dfrac", "frac").rstrip(".")


def maj_at_n(samples: list[dict]) -> float:
    """1 if the most frequent answer is right, 1/k if it is one of k equally frequent, else 0.

    Records of earlier versions have no `vote`. There, spellings of one wrong answer vote apart.
    """
    cast = (s["vote"] if "vote" in s else answer_key(s) for s in samples)
    votes = Counter(vote for vote in cast if vote is not None)
    top = [vote for vote, count in votes.items() if count == max(votes.values())]
    return ("right" in top) / len(top) if top else 0.0


def equal_golds(places: list[int], firsts: list[str], others: list[str]) -> list[bool]:
    return grade(firsts, others)


def label_votes(groups: list[list[dict]], same: Callable = equal_golds):
    """Set `vote` in the samples of each problem: "right", or one spelling of equal wrong answers.

    None is no answer, and no vote. Wrong answers are equal where `same` says so of (places of their
    groups, more frequent spellings, others); by default the grader, with the more frequent one as
    gold. What it cannot read equals nothing but its own spelling. The cost is bounded: VOTE_ROUNDS
    answers per problem collect those equal to them, most frequent first.
    """
    counted, votes, left = grader.pool.stats.copy(), [], []
    answers = [{answer_key(s): s["answer"] for s in group} for group in groups]
    for group in groups:
        keys = [key for key, _ in Counter(map(answer_key, group)).most_common()]
        votes.append({key: key for key in keys})
        left.append([key for key in keys if key not in ("right", None)])
    for _ in range(VOTE_ROUNDS):
        pairs = [(i, keys[0], other) for i, keys in enumerate(left) for other in keys[1:]]
        if not pairs:
            break
        firsts = [answers[i][first] for i, first, _ in pairs]
        others = [answers[i][other] for i, _, other in pairs]
        verdicts = same([i for i, _, _ in pairs], firsts, others)
        for (i, first, other), equal in zip(pairs, verdicts):
            if equal:
                votes[i][other] = first
        left = [[k for k in keys[1:] if votes[i][k] == k] for i, keys in enumerate(left)]
    grader.pool.stats = counted  # the summary counts what was graded against golds
    for group, vote in zip(groups, votes):
        for s in group:
            s["vote"] = vote[answer_key(s)]
