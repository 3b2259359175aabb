r"""The reward: what a completion must look like, and what it is worth.

    R = r_outcome + beta * r_analytic + r_structure + r_length      Eq. 4      total_reward
    r_outcome   = 1 if the answer is right, else 0                  Eq. 3      plumbing.answers
    r_analytic  = softmax over a question's m plans of s_i / tau,   Eq. 2      plan_reward
                  s_i = the share of plan i's z CoTs that are right
    r_structure = 0.2 if the template is strictly followed, else 0  Eq. 6      parse_completion
    r_length    = alpha * exp(-| |o| - T | / (T_max - T))           Eqs. 7, 8  length_reward

Template: <plan> ... </plan> <think> ... </think> <answer> ... \boxed{7} ... </answer>

The paper leaves open: tau (we take 1), alpha (0.1), and T_max (the longest completion of the
question's group). Without a right completion r_length is 0; with T_max = T it is alpha.

Shapes: N questions, m plans per question, z CoTs per plan.
"""

import re
from typing import NamedTuple

from torch import Tensor

from plumbing.answers import last_box

# --------------------------------------------------------------------------------------------------
# The template

TEMPLATE = ["<plan>", "</plan>", "<think>", "</think>", "<answer>", "</answer>"]
TAG = re.compile(r"(</?(?:plan|think|answer)>)", re.IGNORECASE)  # any case: <PLAN> is a wrong tag


class Completion(NamedTuple):
    """The three blocks of a well-formed completion, without surrounding white space."""

    plan: str
    think: str
    answer: str


def parse_completion(text: str) -> Completion | None:
    """The completion's blocks, or None unless it follows the template strictly (Eq. 6).

    Each tag occurs once, in lower case and in order. No block is empty. Only white space is before,
    between and after the blocks. If a chat template prefills the first tag, pass prefill and
    completion together. Linear time.
    """
    # text, tag, text, ..., tag, text. A seventh tag stays in the last text.
    parts = TAG.split(text, maxsplit=len(TEMPLATE))
    if parts[1::2] != TEMPLATE:
        return None
    before, plan, gap, think, gap2, answer, after = (part.strip() for part in parts[0::2])
    if before or gap or gap2 or after or not (plan and think and answer):
        return None
    return Completion(plan, think, answer)


def build_completion(plan: str | None, think: str, answer: str, boxed: bool = True) -> str:
    r"""The text that parse_completion reads back, with the answer in a \boxed{}: SFT's target.

    `plan` None leaves the plan block out (the ablation "SFT without plans"). `boxed` False leaves
    the box out (see data.verifiers.boxed). Raises ValueError if a part is empty or holds a template
    tag.
    """
    blocks = {"think": think, "answer": answer}
    if plan is not None:
        blocks = {"plan": plan, **blocks}
    for name, part in blocks.items():
        if not part.strip() or TAG.search(part):
            shown = repr(part[:80])
            raise ValueError(f"the {name} must be non-empty and free of template tags, got {shown}")
    if boxed:
        blocks["answer"] = f"\\boxed{{{answer.strip()}}}"
    return "\n".join(f"<{name}>\n{part.strip()}\n</{name}>" for name, part in blocks.items())


def extract_answer(text: str, boxed: bool = True) -> str | None:
    r"""The final answer as a string, or None if there is none. Linear time.

    It is the last balanced box of the last <answer> span (which may never close), else the whole
    span. Without an <answer> tag, only the last balanced box of the text counts. Boxes that make up
    one list count as one (see `last_box`). The span is isolated first, because math-verify reads
    "first \boxed{1}, then \boxed{2}" as the set {1, 2}. A text whose plan never closes has no
    answer, whatever its plan holds. `boxed` False takes the whole span, whatever boxes are in it.
    """
    if "<plan>" in text and "</plan>" not in text:
        return None
    start = text.rfind("<answer>")
    if start < 0:
        return boxed and last_box(text) or None
    span = text[start + len("<answer>"):].partition("</answer>")[0]
    return boxed and last_box(span) or span.strip() or None


# --------------------------------------------------------------------------------------------------
# The reward terms


def plan_reward(correct: Tensor, tau: float) -> Tensor:
    """Eq. 2: r_analytic, a softmax over a question's plans of (share of right CoTs) / tau.

    correct (N, m, z), bool or 0/1 -> (N, m) float32; each row sums to 1. Raises ValueError for
    another rank, or tau <= 0.
    """
    _check_shapes(correct=correct)
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    scores = correct.float().mean(dim=2)  # s_i, (N, m)
    return (scores / tau).softmax(dim=1)


def length_reward(
    lengths: Tensor, correct: Tensor, alpha: float, correct_only: bool = False
) -> Tensor:
    """Eqs. 7, 8: alpha * exp(-| |o| - T | / (T_max - T)), highest at T, the shortest right length.

    lengths (N, m, z) in tokens, plan and CoT together; correct (N, m, z) -> (N, m, z) float32 in
    [0, alpha]. T and T_max (the longest, right or wrong) are those of the question's m z
    completions. Without a right completion the reward is 0, with T_max = T it is alpha. Eq. 8
    rewards wrong completions, too; `correct_only` gives those 0. Raises ValueError if shapes
    differ.
    """
    _check_shapes(lengths=lengths, correct=correct)
    lengths = lengths.float()
    right_lengths = lengths.masked_fill(~correct.bool(), float("inf"))
    shortest = right_lengths.amin(dim=(1, 2), keepdim=True)  # T, Eq. 7
    longest = lengths.amax(dim=(1, 2), keepdim=True)  # T_max
    distance = (lengths - shortest).abs().masked_fill(longest == shortest, 0.0)
    # Without a right completion T and the distance are infinite, exp(-inf) = 0. Clamp: no 0/0.
    reward = alpha * (-distance / (longest - shortest).clamp(min=1e-6)).exp()  # Eq. 8
    return reward * correct.bool() if correct_only else reward


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13).

    It is 0 up to max_length - buffer tokens, then falls linearly to -1 at max_length. Any shape ->
    the same shape, float32. Raises ValueError unless 0 < buffer <= max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"the overlong buffer must be in 1 to {max_length}, got {buffer}")
    return ((max_length - buffer - lengths.float()) / buffer).clamp(min=-1, max=0)


def total_reward(
    correct: Tensor, well_formed: Tensor, lengths: Tensor, beta: float, tau: float, alpha: float,
    correct_only: bool = False, structure: float = 0.2,
) -> dict[str, Tensor]:
    """Eqs. 3, 4, 6: every term and their total, each (N, m, z) float32.

    correct, well_formed (N, m, z), bool or 0/1; lengths (N, m, z) in tokens. Keys: total, outcome,
    plan, structure, length. "plan" is r_analytic, before the factor beta. Raises ValueError if the
    shapes differ.
    """
    _check_shapes(correct=correct, well_formed=well_formed, lengths=lengths)
    outcome = correct.bool().float()  # Eq. 3
    plan = plan_reward(correct, tau)[:, :, None].expand(correct.shape)  # Eq. 2, equal for z CoTs
    structured = structure * well_formed.bool().float()  # Eq. 6
    length = length_reward(lengths, correct, alpha, correct_only)  # Eqs. 7, 8
    total = outcome + beta * plan + structured + length  # Eq. 4
    terms = {"outcome": outcome, "plan": plan, "structure": structured, "length": length}
    return {"total": total, **terms}


def _check_shapes(**tensors: Tensor):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shape, *others = shapes.values()
    if len(shape) != 3 or 0 in shape[1:] or any(other != shape for other in others):
        raise ValueError(f"expected one shape (questions, plans, CoTs), not empty, got {shapes}")
