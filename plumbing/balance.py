"""Questions move between ranks after sampling, so that all train on about as many tokens.

Completions of one question are of like length. So a rank that has sampled long ones would keep the
others waiting. Whole groups move: their advantages, and what is logged of them, need nothing else.
"""

from plumbing.ranks import all_gather, rank, world_size


def decoded_tokens(rollouts: list, cots: int) -> int:
    """Tokens of the completions of plan trees with `cots` CoTs per plan, each plan counted once.

    The update computes these and the prompts. A plan that never closed fills its places itself.
    """
    after_plans = sum(len(r.ids) - r.plan_tokens for r in {id(r): r for r in rollouts}.values())
    return after_plans + sum(r.plan_tokens for r in rollouts) // cots


def deal(sizes: list[list[int]], ranks: int) -> list[list[tuple[int, int]]]:
    """Which (rank, place) each rank gets: the largest goes first, to the rank with least so far."""
    order = [(size, owner, n) for owner, own in enumerate(sizes) for n, size in enumerate(own)]
    hands, loads = [[] for _ in range(ranks)], [0] * ranks
    for size, owner, n in sorted(order, key=lambda item: (-item[0], item[1:])):
        least = loads.index(min(loads))
        hands[least].append((owner, n))
        loads[least] += size
    return [sorted(hand) for hand in hands]


def balance(groups: list, cots: int) -> tuple[list, float]:
    """The groups that this rank trains on, and `imbalance`. A collective.

    Each group's `place` says where it came from. Imbalance is the most tokens of any rank, over the
    mean: 1 is even.
    """
    size = lambda group: len(group.rollouts[0].prompt) + decoded_tokens(group.rollouts, cots)
    for n, group in enumerate(groups):
        group.place = (rank(), n)
    if world_size() == 1:
        return groups, 1.0
    held = all_gather(groups)
    sizes = [[size(group) for group in own] for own in held]
    hands = deal(sizes, world_size())
    loads = [sum(sizes[owner][n] for owner, n in hand) for hand in hands]
    imbalance = max(loads) * len(loads) / max(sum(loads), 1)
    return [held[owner][n] for owner, n in hands[rank()]], imbalance
