"""Pydantic's validation errors in plain words: what was expected at which key, what was given, what is allowed.

Ours, because no library reports all faults at once with file and line and with "did you mean": pydantic's locations
also name the branch of a union; here they are followed through the model to the key that the user wrote.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

from .config_tables import EntryOf
from .errors import did_you_mean

Key = tuple[str, ...]


def explain(
    model: type[pydantic.BaseModel],
    error: pydantic.ValidationError,
    values: Mapping[str, Any],
    renamed: Mapping[str, str],
) -> Iterator[tuple[Key, str, bool]]:
    """(key, message, whether the key is missing) of every fault."""
    reported = set()
    followed = [(detail, *_follow(_Slot(model), detail["loc"])) for detail in error.errors()]
    # Where a section or a plain value is allowed and a section was given, only faults inside it count.
    sections = {
        union_key
        for _, key, _, union_key in followed
        if union_key is not None and key != union_key and isinstance(value_at(values, union_key), Mapping)
    }
    for detail, key, slot, union_key in followed:
        kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
        if union_key in sections and key == union_key:
            continue
        if union_key is not None and union_key not in sections:
            key, slot, _ = _follow(_Slot(model), detail["loc"][: _length_at(model, detail["loc"], union_key)])
            kind, given = "union", value_at(values, key)
        if kind == "missing" and isinstance(detail["loc"][-1], int):
            key, slot, _ = _follow(_Slot(model), detail["loc"][:-1])  # a tuple is short of an entry
            kind, given = "too_short", value_at(values, key)

        if kind == "extra_forbidden":
            yield key, _unknown(model, key, _follow(_Slot(model), detail["loc"][:-1])[1], renamed), False
        elif kind == "missing":
            yield key, _missing(key, slot), True
        elif kind in ("union_tag_invalid", "union_tag_not_found") and slot and slot.discriminator:
            inner, choices = (*key, slot.discriminator), slot.tags()
            if kind == "union_tag_not_found":
                yield inner, f"missing: expected {_one_of(choices)}", True
            else:
                yield inner, _expected(_one_of(choices), value_at(values, inner), choices), False
        elif kind in ("value_error", "assertion_error"):
            yield key, str(context.get("error") or detail["msg"]), False
        elif (key, kind) not in reported:
            reported.add((key, kind))
            wanted = "" if kind in _WORDED_BY_PYDANTIC or not slot else slot.describe()
            wanted = wanted or detail["msg"].removeprefix("Input should be ")
            yield key, _expected(wanted, given, slot.choices() if slot else ()), False


def dotted(key: Sequence[str]) -> str:
    """`validation.prompts[2]`."""
    return "".join(f"[{part}]" if part.isdigit() and i else f".{part}" for i, part in enumerate(key)).removeprefix(".")


def foreign(hint: str, value: str = "") -> str:
    """The hint for another program's flag: the key of the same meaning here, or the sentence on why there is none."""
    return hint if " " in hint else f"here it is {hint}{value}"


_WORDED_BY_PYDANTIC = ("string_pattern_mismatch", "custom_error", "finite_number")


@dataclass(frozen=True)
class _Slot:
    """The type that a key accepts, with its declared limits and discriminator."""

    type: Any
    limits: tuple[Any, ...] = ()
    discriminator: str | None = None

    @staticmethod
    def of(annotation: Any, limits: Sequence[Any] = (), discriminator: Any = None) -> _Slot:
        limits = tuple(limits)
        while get_origin(annotation) is Annotated:
            annotation, *declared = get_args(annotation)
            for item in declared:
                limits += tuple(item.metadata) if isinstance(item, FieldInfo) else (item,)
                discriminator = getattr(item, "discriminator", None) or discriminator
        entry = next((limit for limit in limits if isinstance(limit, EntryOf)), None)
        if entry is not None:
            return _Slot(entry.union, discriminator=entry.discriminator)
        slot = _Slot(annotation, limits, discriminator if isinstance(discriminator, str) else None)
        rest = [member for member in get_args(annotation) if member is not type(None)]
        if get_origin(annotation) in (Union, types.UnionType) and len(rest) == 1:
            return _Slot(annotation, limits, slot.discriminator or _Slot.of(rest[0]).discriminator)
        return slot

    def members(self) -> tuple[_Slot, ...]:
        """The members of a union, also of nested ones; any other type is its own only member."""
        if get_origin(self.type) not in (Union, types.UnionType):
            return (self,)
        return tuple(inner for member in get_args(self.type) for inner in _Slot.of(member, self.limits).members())

    def models(self) -> list[type[pydantic.BaseModel]]:
        kinds = [member.type for member in self.members()]
        return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]

    def tags(self) -> list[Any]:
        return [tag for model in self.models() for tag in self._tags_of(model)]

    def tagged(self, tag: Any) -> type[pydantic.BaseModel] | None:
        return next((model for model in self.models() if str(tag) in map(str, self._tags_of(model))), None)

    def choices(self) -> list[Any]:
        """The values of Literals and Enums."""
        found = []
        for member in self.members():
            if get_origin(member.type) is Literal:
                found += get_args(member.type)
            elif isinstance(member.type, type) and issubclass(member.type, enum.Enum):
                found += [item.value for item in member.type]
        return found

    def describe(self) -> str:
        """`a whole number >= 1 or 'auto'`; empty where the type has no plain name."""
        wanted = [_one_of(choices)] if (choices := self.choices()) else []
        wanted += [member._describe_one() for member in self.members() if not member.choices()]
        return " or ".join(dict.fromkeys(wanted)) if all(wanted) else ""

    def _describe_one(self) -> str:
        origin, inner = get_origin(self.type) or self.type, get_args(self.type)
        if self.models():
            return "a section of `key: value` lines"
        if origin in (list, tuple, set, frozenset):
            entries = [item for item in inner if item is not Ellipsis]
            each = f", each {_Slot.of(entries[0]).describe()}" if len(set(entries)) == 1 else ""
            count = f" of {len(inner)}" if origin is tuple and Ellipsis not in inner else self._length(" of at least ")
            return f"a list{count}{each}"
        if origin in (dict, Mapping):
            return "a mapping" + (f" whose values are each {_Slot.of(inner[1]).describe()}" if len(inner) == 2 else "")
        if origin is str and self._length():
            return (
                "text that is not empty" if self._length() == "1" else f"text of at least {self._length()} characters"
            )
        name = _NAMES.get(origin, "")
        return name + self._range() if origin in (int, float) else name

    def _range(self) -> str:
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        bounds = [f"{sign} {value}" for name, sign in signs.items() if (value := self._limit(name)) is not None]
        step = f", a multiple of {step}" if (step := self._limit("multiple_of")) else ""
        return (" " + " and ".join(bounds) if bounds else "") + step

    def _length(self, before: str = "") -> str:
        shortest = self._limit("min_length")
        return f"{before}{shortest}" if shortest else ""

    def _limit(self, name: str) -> Any:
        return next((found for limit in self.limits if (found := getattr(limit, name, None)) is not None), None)

    def _tags_of(self, model: type[pydantic.BaseModel]) -> list[Any]:
        if self.discriminator is None:
            return []
        field = model.model_fields[self.discriminator]
        return _Slot.of(field.annotation).choices()


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}


def _follow(slot: _Slot | None, location: Sequence[int | str]) -> tuple[Key, _Slot | None, Key | None]:
    """The key at pydantic's location, its slot, and the key of the last plain union on the way."""
    key: Key = ()
    union_key: Key | None = None
    for part in location:
        members = [member for member in slot.members() if member.type is not type(None)] if slot else []
        if slot and slot.discriminator:
            slot = _Slot(slot.tagged(part))
        elif len(members) > 1:
            union_key = key
            slot = next((member for member in members if getattr(member.type, "__name__", None) == part), None)
        else:
            key = (*key, str(part))
            slot = _entry(members[0], part) if members else None
    return key, slot, union_key


def _length_at(model: type[pydantic.BaseModel], location: Sequence[int | str], union_key: Key) -> int:
    """The length of the part of pydantic's location that leads to the union at `union_key`."""
    return next(n for n in range(len(location) + 1) if _follow(_Slot(model), location[:n])[0] == union_key)


def _entry(slot: _Slot, part: int | str) -> _Slot | None:
    """The slot of an entry of a model, list, tuple or mapping."""
    if models := slot.models():
        field = models[0].model_fields.get(str(part))
        return _Slot.of(field.annotation, field.metadata, field.discriminator) if field else None
    inner = [item for item in get_args(slot.type) if item is not Ellipsis]
    if get_origin(slot.type) is tuple and isinstance(part, int) and len(inner) > 1:
        return _Slot.of(inner[part]) if part < len(inner) else None
    return _Slot.of(inner[-1]) if inner else None


def _unknown(root: type[pydantic.BaseModel], key: Key, section: _Slot | None, renamed: Mapping[str, str]) -> str:
    name = key[-1]
    allowed = list(section.models()[0].model_fields) if section and section.models() else []
    ours = renamed.get(name) or renamed.get(name.replace("-", "_"))
    near = did_you_mean(name, allowed)
    elsewhere = [dotted(path) for path in _all_keys(root) if path[-1] == name and path != key] if not near else []
    if ours or len(elsewhere) == 1:
        return f"unknown key; {foreign(ours or elsewhere[0])}"
    return f"unknown key.{near} Allowed: {', '.join(allowed)}"


def _missing(key: Key, slot: _Slot | None) -> str:
    if slot and slot.discriminator:
        return f"missing section; it needs {dotted((*key, slot.discriminator))}: {_one_of(slot.tags())}"
    if slot and (models := slot.models()):
        needed = [name for name, field in models[0].model_fields.items() if field.is_required()]
        return f"missing section; it needs {', '.join(dotted((*key, name)) for name in needed) or 'to be there'}"
    wanted = slot.describe() if slot else ""
    return "missing" + (f": expected {wanted}" if wanted else "")


def _all_keys(model: type[pydantic.BaseModel], above: Key = ()) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        if len(above) < 4:  # models may contain themselves
            for inner in _Slot.of(field.annotation, (), field.discriminator).models():
                yield from _all_keys(inner, (*above, name))


def _expected(wanted: str, given: Any, choices: Sequence[Any] = ()) -> str:
    hint = did_you_mean(given, [str(choice) for choice in choices]) if isinstance(given, str) else ""
    if wanted.startswith("text") and isinstance(given, int | float):
        hint = " Quotes make it text."
    if wanted.startswith("a section") and given is None:
        hint = " Leave the key out to take the defaults."
    return f"expected {wanted}, got {_show(given)}" + (f".{hint}" if hint else "")


def _one_of(choices: Sequence[Any]) -> str:
    return ("one of " if len(choices) > 1 else "") + ", ".join(_show(choice) for choice in choices)


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a section"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def value_at(values: Any, key: Key) -> Any:
    for part in key:
        if isinstance(values, list):
            values = values[int(part)] if int(part) < len(values) else None
        else:
            values = values.get(part) if isinstance(values, Mapping) else None
    return values
