"""What every section of a recipe is made of: frozen, strict, without unknown keys; and the types of its values."""

from __future__ import annotations

import keyword
import math
import re
import sys
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lm_train.recipe.text import WrittenFloat, WrittenInt

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
PositiveIntOrAuto = PositiveInt | Auto
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _as_text(value: Any) -> Any:
    """``name=2024`` is a name, not a number, and stays as it was written."""
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.text
    return str(value) if type(value) in (int, float) else value


Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        """What contradicts itself inside the section: the keys concerned, and a sentence with values and a way out."""
        return []


Dropout = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def is_package_name(name: str) -> bool:
    """Whether it is one plain name, as of a top-level package."""
    return name.isidentifier() and not keyword.iskeyword(name)


def _factory(value: Any) -> Any:
    module, colon, function = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon or not all(map(is_package_name, (*module.split("."), function))):
        raise ValueError(f"expected package.module:function, such as mypkg.nets:build; got {value!r}"[:300])
    return value


Factory = Annotated[str, BeforeValidator(_factory)]
"""`package.module:function`."""


def _packages(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected a package's name, or several as [a, b]; got {value!r}"[:300])
    for name in names:
        if not is_package_name(name):
            top = name.split(".")[0].split(":")[0]
            hint = f"; did you mean plugins={top}?" if is_package_name(top) else ""
            raise ValueError(f"expected the name of a top-level package, such as mypkg; got {name!r}"[:300] + hint)
        if name in sys.stdlib_module_names:
            raise ValueError(f"{name} belongs to Python itself; name a package with models or data of your own")
    return tuple(names)


Packages = Annotated[tuple[str, ...], BeforeValidator(_packages)]


def _changes(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected sections or keys, such as [data] or [model.dropout]; got {value!r}"[:300])
    for name in names:
        if not re.fullmatch(r"seed|(data|model)(\.[a-z][a-z0-9_]*)*", name):
            raise ValueError(
                f"expected seed, data, model, or keys of data and model, such as model.dropout; got {name!r}"[:300]
            )
    return tuple(names)


Changes = Annotated[tuple[str, ...], BeforeValidator(_changes)]


def _plain(value: Any) -> Any:
    """Written numbers as plain ones, all the way down."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected finite numbers; got {getattr(value, 'text', value)}")
    return int(value) if isinstance(value, WrittenInt) else float(value) if isinstance(value, WrittenFloat) else value


FreeMapping = Annotated[dict[str, Any], BeforeValidator(_plain)]
"""Keys that someone else's code understands, with values as YAML has them."""
