"""The layout that README promises: six stage files, floors, no import that reaches up."""

import ast
from pathlib import Path

import pytest

from conftest import ROOT

FLOORS = [  # a file imports from its own floor and from those before it
    ("plumbing",),
    ("model_utils", "rewards"),
    ("data",),
    ("grpo", "sft"),
    ("eval", "distill"),
    ("report", "bench", "recipes", "docs"),
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def imported(file: Path) -> set[str]:
    """Names of our own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found & FLOOR.keys()


def files() -> list[Path]:
    folders = [ROOT, *(ROOT / name for name in FLOOR if (ROOT / name).is_dir())]
    return [file for folder in folders for file in sorted(folder.glob("*.py"))]


def home(file: Path) -> str:
    return file.stem if file.parent == ROOT else file.parent.name


def test_the_top_level_holds_the_six_files_of_the_method():
    expected = {"distill", "eval", "grpo", "model_utils", "rewards", "sft"}
    assert {file.stem for file in ROOT.glob("*.py")} == expected


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_the_floors_only(file):
    above = {name for name in imported(file) if FLOOR[name] > FLOOR[home(file)]}
    assert not above, f"{file.name} reaches up to {above}"
    if home(file) == "plumbing":
        assert imported(file) <= {"plumbing"}


def test_evaluation_and_distilling_borrow_the_sampling_loop_only():
    for stage, wanted in (("eval", ["sample", "sample_tree"]), ("distill", ["sample"])):
        tree = ast.parse((ROOT / f"{stage}.py").read_text())
        borrowed = [
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "grpo"
            for alias in node.names
        ]
        assert borrowed == wanted
