"""Plans that are acted on: calls per completion, and what becomes of plans that are wrong.

Where the truth is known (data/verifiers.py, PLANNED), each completion has a `revision`: whether its
plan was wrong, which means that carrying it out as it stands would not have succeeded in this
completion's world, and whether the CoT left it. Figures:

    plan_wrong     share of completions whose plan was wrong
    wrong_left     share of these whose CoT left the plan
    left_right     share of these that were right
    good_left      share of the completions with a good plan whose CoT left it
"""

import torch

from plumbing.ranks import all_sum

TEXT = """  the plan was wrong in {plan_wrong:.3f} of {revisions} samples; the CoT left it in \
{wrong_left:.3f} of these,
  and was right in {left_right:.3f} of those; it left a good plan in {good_left:.3f}"""


def shares(sums: list[float]) -> dict[str, float]:
    """The figures that exist. `sums`: what `count` returns."""
    known, wrong, left, right, good_left = sums
    pairs = {
        "plan_wrong": (wrong, known),
        "wrong_left": (left, wrong),
        "left_right": (right, left),
        "good_left": (good_left, known - wrong),
    }
    return {name: part / whole for name, (part, whole) in pairs.items() if whole}


def count(seen: list[tuple[tuple[bool, bool] | None, bool]]) -> list[int]:
    """Completions with a known revision; wrong plans; left ones of these; right ones of these; and
    good plans that were left. `seen`: revision and verdict of each completion."""
    known = [(*revision, right) for revision, right in seen if revision is not None]
    left = [right for wrong, left, right in known if wrong and left]
    good_left = sum(left and not wrong for wrong, left, _ in known)
    return [len(known), sum(wrong for wrong, *_ in known), len(left), sum(left), good_left]


def call_metrics(groups: list, device) -> dict[str, float]:
    """Calls and revisions of a step, over all ranks; nothing where there are none. A collective.

    calls           answered calls per completion
    given_tokens    tokens of replies per completion
    forged          share of completions that wrote a reply themselves
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    found = [len(rollouts), sum(r.calls for r in rollouts), sum(len(r.given) for r in rollouts)]
    found += [sum(r.forged for r in rollouts)]
    found += count([(r.revision, r.correct) for r in rollouts])
    found = torch.tensor(found, dtype=torch.float64, device=device)
    total, calls, given, forged, *sums = all_sum(found).tolist()
    used = {"calls": calls, "given_tokens": given, "forged": forged}
    metrics = {name: value / total for name, value in used.items()} if calls or forged else {}
    return metrics | shares(sums)


def revision_figures(samples: list[dict]) -> dict[str, float]:
    """The same of eval.py's samples: their shares, and `revisions`, how many are known."""
    sums = count([(s.get("revision"), s["correct"]) for s in samples])
    return {"revisions": sums[0], **shares(sums)} if sums[0] else {}


def revision_text(figures: dict) -> str:
    """Lines for a summary; a share that does not exist is nan."""
    names = ("plan_wrong", "wrong_left", "left_right", "good_left")
    return TEXT.format(**{name: float("nan") for name in names} | figures)
