"""Plain values to frozen dataclasses, strictly: no unknown key, no missing key, no wrong type.

OmegaConf's own merge onto a structured config converts ("18" becomes 18, true becomes "true")
and words its errors for programmers; here a value has the type that the schema states.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from runner.config.mistakes import Mistake, did_you_mean, listed

T = TypeVar("T")

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section of keys",
}

#: Evaluating them anew for each job of a sweep would take most of its planning.
_hints: dict[type[Any], dict[str, Any]] = {}


def build(cls: type[T], values: Any, *, path: str = "") -> T:
    """An instance of the dataclass `cls`, nested ones included.

    Args:
        cls: A frozen dataclass.
        values: Plain values by key.
        path: Dotted key of `values`; empty for the whole configuration.

    Raises:
        Mistake: A key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise Mistake(path, f"{path} must be {_WORDS[dict]}; got {values!r}")
    hints = type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    refuse_unknown(values, fields, path=path)
    for name, field in fields.items():
        if name not in values and _required(field):
            raise Mistake(join(path, name), f"{join(path, name)} must be given: nothing sets it")
    converted = {
        name: _convert(value, hints[name], join(path, name)) for name, value in values.items()
    }
    return cls(**converted)


def type_hints(cls: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    if cls not in _hints:
        _hints[cls] = typing.get_type_hints(cls)
    return _hints[cls]


def known_keys(cls: type[Any], path: str = "") -> list[str]:
    """Every dotted key of the dataclass `cls`, sections included."""
    keys: list[str] = []
    for name, hint in type_hints(cls).items():
        key = join(path, name)
        keys.append(key)
        if dataclasses.is_dataclass(hint):
            keys.extend(known_keys(typing.cast("type[Any]", hint), key))
    return keys


def refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], *, path: str) -> None:
    """Every key of `values` must be one of `known`.

    Raises:
        Mistake: One is not.
    """
    for name in values:
        if name not in known:
            key = join(path, str(name))
            where = f"the section {path!r}" if path else "the configuration"
            siblings = [join(path, other) for other in known]
            raise Mistake(
                key,
                f"{key} is not a key of {where}{did_you_mean(key, siblings)}; "
                f"its keys are: {listed(known) or 'none'}",
            )


def check_like(value: Any, example: Any, *, key: str) -> None:
    """A value of a free section must have the type of the one that introduced its key.

    A whole number passes for a number; an example of null lets anything pass.

    Raises:
        Mistake: It has another type, or a section's keys differ.
    """
    if example is None:
        return
    kind = next(kind for kind in _WORDS if isinstance(example, kind))
    if not _is_kind(value, kind):
        raise wrong_type(key, kind, value)
    if kind is dict:
        check_section(value, example, path=key)
    if kind is list and example:
        for index, item in enumerate(value):
            check_like(item, example[0], key=f"{key}[{index}]")


def check_section(values: Mapping[str, Any], example: Mapping[str, Any], *, path: str) -> None:
    """A free section must have the keys of `example`, each with a value of its type.

    Raises:
        Mistake: A key is unknown or missing, or a value has the wrong type.
    """
    refuse_unknown(values, example, path=path)
    for name, item in example.items():
        key = join(path, name)
        if name not in values:
            raise Mistake(key, f"{key} must be given: its file sets it to {item!r}")
        check_like(values[name], item, key=key)


def wrong_type(key: str, kind: type[Any], value: Any) -> Mistake:
    """The mistake of a value that is not of `kind`."""
    return Mistake(key, f"{key} must be {_WORDS[kind]}; got {_shown(value)}")


def join(path: str, name: str) -> str:
    """The dotted key of `name` in the section `path`."""
    return f"{path}.{name}" if path else name


def _required(field: dataclasses.Field[Any]) -> bool:
    no_default = field.default is dataclasses.MISSING
    return no_default and field.default_factory is dataclasses.MISSING


def _convert(value: Any, hint: Any, key: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, path=key)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice(value, hint, key)
    kind = typing.get_origin(hint) or hint
    if not _is_kind(value, kind):
        raise wrong_type(key, kind, value)
    return float(value) if kind is float else value


def _choice(value: Any, choices: type[enum.Enum], key: str) -> enum.Enum:
    names = [str(member.value) for member in choices]
    if value not in names:
        meant = did_you_mean(str(value), names)
        raise Mistake(key, f"{key} must be one of {listed(names)}; got {value!r}{meant}")
    return choices(value)


def _is_kind(value: Any, kind: type[Any]) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _shown(value: Any) -> str:
    words = {str: "the text", bool: "the flag", list: "the list", dict: "the section"}
    return f"{words.get(type(value), '')} {value!r}".strip()
