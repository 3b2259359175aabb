"""Functions of the user's own, which records name as file.py:function."""

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def locate(name, data: str):
    """`file.py:function` with an absolute path, where there is such a file; else `name` itself.

    It is looked for beside `data`, in the working directory, and in this repository.
    """
    file, _, function = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    for folder in (Path(data).parent, Path(), ROOT) if file else ():
        if (folder / file).is_file():
            return f"{(folder / file).resolve()}:{function}"
    return name


@functools.cache
def module_of(file: str):
    """The module in a file, or why it cannot be used."""
    if not Path(file).is_file():
        return "no such file is beside the data, in the working directory or in the repository"
    spec = importlib.util.spec_from_file_location(f"verifier {file}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of any kind: it is the user's code
        return f"{Path(file).name} cannot be imported ({said(error)})"
    return module


def load(name: str) -> Callable | str:
    """The function that `file.py:function` names, or why it cannot be used."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        return "it is not file.py:function"
    module = module_of(file)
    if isinstance(module, str):
        return module
    found = getattr(module, function, None)
    return found if callable(found) else f"{Path(file).name} has no function {function}"


def said(error: Exception) -> str:
    """An exception with its place, in short."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f"{type(error).__name__} in {place}: {' '.join(str(error).split())[:200]}"
