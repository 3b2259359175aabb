"""The patches of docs/variants: they apply to a copy of grpo.py, and do what their papers say.

Every check must also fail on grpo.py as it is: else it would say nothing about the patch.
"""

import ast
import importlib.util
import math
import shutil
import subprocess
import sys

import pytest
import torch

import grpo
from conftest import ROOT

VARIANTS = sorted((ROOT / "docs/variants").glob("*.patch"))
REMEDY = "make its change to grpo.py by hand, then write it anew as docs/variants/README.md says"


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """patched(name): grpo.py with a patch, as a module."""

    def patched(name: str):
        shutil.copy(ROOT / "grpo.py", tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        command = ["git", "apply", str(ROOT / f"docs/variants/{name}.patch")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}.patch no longer applies: {REMEDY}\n{done.stderr}"
        assert (tmp_path / "grpo.py").read_text() != (ROOT / "grpo.py").read_text()
        spec = importlib.util.spec_from_file_location(f"grpo_{name}", tmp_path / "grpo.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        return module

    return patched


def functions(source: str) -> dict[str, str]:
    return {node.name: ast.dump(node) for node in ast.parse(source).body if hasattr(node, "name")}


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_variant_changes_at_most_12_lines_of_one_function(path, patched):
    head, _, diff = path.read_text().partition("--- a/grpo.py\n+++ b/grpo.py\n")
    assert "arXiv" in head and "    --" in head  # its source and its flags
    changed = [line for line in diff.splitlines() if line[0] in "+-"]
    assert 0 < len(changed) <= 12 and max(map(len, changed)) <= 101
    old = functions((ROOT / "grpo.py").read_text())
    new = functions(open(patched(path.stem).__file__).read())
    touched = [name for name in old if new[name] != old[name]]
    assert len(touched) == 1 and f"{path.name}) | `{touched[0]}`" in page() and [*old] == [*new]


def page() -> str:
    return (ROOT / "docs/variants/README.md").read_text()


def test_every_variant_has_a_check_and_a_place_on_the_page():
    assert {path.stem for path in VARIANTS} == CHECKS.keys()
    assert all(f"[{name}.patch]({name}.patch)" in page() for name in CHECKS)


# --------------------------------------------------------------------------------------------------
# By hand


def loss_of(module, log_ratios: list, advantages: list, low: float, high: float):
    """Loss (B, T-1), its gradient by the logprobs if each token weighs 1, and clip_frac.

    None is outside the mask, where old logprobs are garbage. All logprobs are -2.
    """
    mask = torch.tensor([[x is not None for x in row] for row in log_ratios])
    logprobs = torch.full(mask.shape, -2.0).masked_fill(~mask, 0.0).requires_grad_()
    old = torch.tensor([[-99.0 if x is None else -2.0 - x for x in row] for row in log_ratios])
    loss, metrics = module.policy_loss(logprobs, old, torch.tensor(advantages), mask, low, high)
    return loss.detach(), torch.autograd.grad(loss.sum(), logprobs)[0], int(metrics["clip_frac"])


def close(found: torch.Tensor, wanted: list):
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-5), found


def check_gspo(module):
    """Ratios e^0.3 (clipped at 1.2), e^-0.1, and 1 though one of its tokens has ratio e^0.5.

    A sequence's loss is -s A per token, and its gradient by each logprob is -s A: s is the mean's
    exponential, so the n tokens' losses pull 1/n each on every token.
    """
    log_ratios = [[0.2, 0.4], [-0.1, None], [0.5, -0.5]]
    loss, gradient, clipped = loss_of(module, log_ratios, [1.0, -1.0, 2.0], 0.2, 0.2)
    s = math.exp(-0.1)
    close(loss, [[-1.2, -1.2], [s, 0.0], [-2.0, -2.0]])
    close(gradient, [[0.0, 0.0], [s, 0.0], [-2.0, -2.0]])
    assert clipped == 2  # both tokens of the first sequence


def check_cispo(module):
    """Weights 1.2 (of 1.5), 1.1, 0.8 (of 0.5); grpo.py's gradient of the first and last is 0."""
    log_ratios = [[math.log(1.5), math.log(1.1)], [math.log(0.5), None]]
    loss, gradient, clipped = loss_of(module, log_ratios, [1.0, -1.0], 0.2, 0.2)
    close(loss, [[1.2 * 2, 1.1 * 2], [-0.8 * 2, 0.0]])  # -weight * A * logprob, which is -2
    close(gradient, [[-1.2, -1.1], [0.8, 0.0]])
    assert clipped == 2


def check_rloo(module):
    """Three others of a right one hold one right one: 1 - 1/3. In the second group 4 - 2."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [4.0, 1.0, 2.0, 3.0], [5.0] * 4])
    wanted = [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [2.0, -2.0, -2 / 3, 2 / 3], [0.0] * 4]
    close(module.group_advantages(rewards, std_norm=False), wanted)


def check_reinforce_pp_baseline(module):
    """Centred: +-1/2, +-1 and 0: the std of all six is sqrt((2/4 + 2) / 6)."""
    rewards, std = torch.tensor([[1.0, 0.0], [3.0, 1.0], [7.0, 7.0]]), math.sqrt(2.5 / 6)
    wanted = [[0.5 / std, -0.5 / std], [1 / std, -1 / std], [0.0, 0.0]]
    close(module.group_advantages(rewards), wanted)
    close(module.group_advantages(rewards, std_norm=False), [[0.5, -0.5], [1.0, -1.0], [0.0, 0.0]])
    close(module.group_advantages(torch.full((2, 3), 0.1)), [[0.0] * 3] * 2)  # no 0/0


CHECKS = {
    "gspo": check_gspo,
    "cispo": check_cispo,
    "rloo": check_rloo,
    "reinforce_pp_baseline": check_reinforce_pp_baseline,
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_variant_by_hand(name, patched):
    CHECKS[name](patched(name))
    with pytest.raises(AssertionError):
        CHECKS[name](grpo)
