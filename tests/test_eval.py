"""pass@k against brute force, intervals against known cases, figures of records worked out by hand."""
from itertools import combinations

import numpy as np
import pytest

from eval import bootstrap_interval, pass_at_k, summarise


def test_pass_at_k_equals_brute_force():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k wants"):
        pass_at_k(n, c, k)


def test_bootstrap_interval_matches_the_normal_one_on_a_large_sample():
    values = (np.random.default_rng(1).random(2000) < 0.3).astype(float)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.003) and high == pytest.approx(values.mean() + half, abs=0.003)
    assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)


def test_summary_by_hand():
    def sample(correct, tokens, well_formed=True, truncated=False):
        return {"correct": correct, "tokens": tokens, "well_formed": well_formed, "truncated": truncated}
    records = [{"samples": [sample(True, 10), sample(False, 20)]},
               {"samples": [sample(True, 30), sample(True, 40, well_formed=False)]},
               {"samples": [sample(False, 50, truncated=True), sample(False, 60)]}]
    summary = summarise(records)
    assert summary["accuracy"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert summary["ci_low"] == 0.0 and summary["ci_high"] == 1.0  # three problems say little
    assert summary["mean_length"] == 35 and summary["format_rate"] == pytest.approx(5 / 6)
    assert summary["truncation_rate"] == pytest.approx(1 / 6) and summary["n_problems"] == 3
    assert summary["pass_at_k"] == {1: pytest.approx(0.5), 2: pytest.approx(2 / 3)}
