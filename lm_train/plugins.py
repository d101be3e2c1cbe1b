"""The user's own code: which packages may run, and how a `package.module:function` becomes what it returns. Free of torch.

A recipe alone cannot make code run: the package's top-level name must also be said where only the user writes, as the word
`plugins=PACKAGE` or in the environment. Nothing of a package is imported before that was checked.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_train.errors import UsageError
from lm_train.recipe import PLUGINS_VARIABLE, Recipe


def allow(packages: Iterable[str]) -> None:
    """Lets this process, and those it starts, run code of these packages besides those of the environment."""
    names = dict.fromkeys([*allowed(), *packages])
    if names:
        os.environ[PLUGINS_VARIABLE] = ",".join(names)


def allowed() -> list[str]:
    """Top-level packages that the user allows."""
    return [name.strip() for name in os.environ.get(PLUGINS_VARIABLE, "").split(",") if name.strip()]


def check(recipe: Recipe) -> None:
    """Whether the user allows what the recipe names, and has it; imports nothing of it.

    Raises:
        UsageError: saying what to add to the command.
    """
    problems = []
    for section in ("model", "data"):
        factory: str | None = getattr(getattr(recipe, section), "factory", None)
        if factory is not None:
            problem = _refusal(factory) or _absence(factory)
            if problem:
                problems.append(f"{section}.factory: {problem}")
    if problems:
        raise UsageError(problems)


def _refusal(factory: str) -> str | None:
    package = factory.partition(":")[0].split(".")[0]
    if package in sys.stdlib_module_names:
        return f"{factory} is of Python itself, not of a package with models or data of your own"
    if package in allowed():
        return None
    together = ",".join([*allowed(), package])
    word = f"plugins=[{together}]" if allowed() else f"plugins={package}"
    return (
        f"{factory} would run code of the package {package}, which a recipe alone cannot allow; if you trust it, add {word} to "
        f"the command, or set {PLUGINS_VARIABLE}={together} in the environment"
    )


def _absence(factory: str) -> str | None:
    package = factory.partition(":")[0].split(".")[0]
    _see_current_folder()
    if importlib.util.find_spec(package) is None:
        return (
            f"no package {package} in {Path.cwd()} nor among the installed ones; start where it lies, or set PYTHONPATH"
        )
    return None


def _see_current_folder() -> None:
    """As `python -m` does: a console script does not look there."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def make(key: str, factory: str, args: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
    """What the factory returns.

    Args:
        key: of the recipe, for messages: `model.factory`.
        factory: `package.module:function`.
        args: keyword arguments.
        offered: further keyword arguments, for the parameters of these names.

    Raises:
        UsageError: if it is not allowed, not there, cannot be called so, or fails; in one line, with the place in the user's
            code. The error it comes from is its cause.
    """
    refused = _refusal(factory)
    if refused:
        raise UsageError(f"{key}: {refused}")
    function = _function(key, factory)
    parameters: Mapping[str, inspect.Parameter] = {}
    with contextlib.suppress(TypeError, ValueError):  # written in C
        parameters = inspect.signature(function).parameters
    given = {**args, **{name: value for name, value in offered.items() if name in parameters and name not in args}}
    try:
        if parameters:
            inspect.signature(function).bind(**given)
    except TypeError as error:
        takes = ", ".join(str(parameter) for parameter in parameters.values())
        section = key.partition(".")[0]
        raise UsageError(f"{section}.args: {factory} takes ({takes}): {error}") from error
    try:
        return function(**given)
    except Exception as error:
        raise UsageError(f"{key}: {factory} failed with {told(error)}") from error


def _function(key: str, factory: str) -> Callable[..., Any]:
    module_name, _, name = factory.partition(":")
    _see_current_folder()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsageError(
                f"{key}: no module {error.name} in {Path.cwd()} nor among the installed packages"
            ) from error
        raise UsageError(f"{key}: {module_name} cannot be imported: {told(error)}") from error
    except Exception as error:
        raise UsageError(f"{key}: {module_name} cannot be imported: {told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        what = "is not callable" if hasattr(module, name) else "is not in it"
        raise UsageError(f"{key}: {module_name}: {name} {what}; there are {', '.join(there[:10]) or 'no functions'}")
    return function


def told(error: BaseException) -> str:
    """An error of the user's code in one line, with the place where it arose."""
    message = " ".join(str(error).split()) or "no message"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message[:300]}{place}"
