"""Pydantic's validation errors in plain words: what was expected at which key, what was given, what is allowed.

Ours, because no library reports all faults at once with file and line and with "did you mean": pydantic's locations
also name the branch of a union; here they are followed through the model's JSON schema to the key that the user wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from .errors import did_you_mean

Key = tuple[str, ...]
Node = dict[str, Any]
"""The JSON schema of what a key accepts."""


def explain(
    model: type[pydantic.BaseModel],
    error: pydantic.ValidationError,
    values: Mapping[str, Any],
    renamed: Mapping[str, str],
) -> Iterator[tuple[Key, str, bool]]:
    """(key, message, whether the key is missing) of every fault."""
    schema, reported = _Schema(model), set()
    followed = [(detail, *schema.follow(detail["loc"])) for detail in error.errors()]
    # Where a section or a plain value is allowed and a section was given, only faults inside it count.
    sections = {
        union_key
        for _, key, _, union_key in followed
        if union_key is not None and key != union_key and isinstance(value_at(values, union_key), Mapping)
    }
    for detail, key, node, union_key in followed:
        kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
        if union_key in sections and key == union_key:
            continue
        if union_key is not None and union_key not in sections:
            length = next(n for n in range(len(detail["loc"]) + 1) if schema.follow(detail["loc"][:n])[0] == union_key)
            key, node, _ = schema.follow(detail["loc"][:length])
            kind, given = "union", value_at(values, key)
        if kind == "missing" and isinstance(detail["loc"][-1], int):
            key, node, _ = schema.follow(detail["loc"][:-1])  # a tuple is short of an entry
            kind, given = "too_short", value_at(values, key)

        if kind == "extra_forbidden":
            yield key, schema.unknown(key, schema.follow(detail["loc"][:-1])[1], values, renamed), False
        elif kind == "missing":
            yield key, schema.missing(key, node), True
        elif kind in ("union_tag_invalid", "union_tag_not_found") and node and "discriminator" in node:
            inner, choices = (*key, node["discriminator"]["propertyName"]), schema.tags(node)
            if kind == "union_tag_not_found":
                yield inner, f"missing: expected {_one_of(choices)}", True
            else:
                yield inner, _expected(_one_of(choices), value_at(values, inner), choices), False
        elif kind in ("value_error", "assertion_error"):
            yield key, str(context.get("error") or detail["msg"]), False
        elif (key, kind) not in reported:
            reported.add((key, kind))
            wanted = "" if kind in _WORDED_BY_PYDANTIC or not node else schema.describe(node)
            wanted = wanted or detail["msg"].removeprefix("Input should be ")
            yield key, _expected(wanted, given, schema.choices(node) if node else ()), False


def dotted(key: Sequence[str]) -> str:
    """`validation.prompts[2]`."""
    return "".join(f"[{part}]" if part.isdigit() and i else f".{part}" for i, part in enumerate(key)).removeprefix(".")


def hint(model: type[pydantic.BaseModel], values: Any, ours: str, value: str = "") -> str:
    """The hint for another program's flag: a key here, as far as this config accepts it, or why there is none.

    Args:
        ours: The key of the same meaning, or a sentence on why there is none.
    """
    return ours if " " in ours else _Schema(model).placed(ours, values) or f"here it is {ours}{value}"


def value_at(values: Any, key: Key) -> Any:
    """The value at a key of nested mappings and lists; None if there is none."""
    for part in key:
        if isinstance(values, list):
            values = values[int(part)] if part.isdigit() and int(part) < len(values) else None
        else:
            values = values.get(part) if isinstance(values, Mapping) else None
    return values


_WORDED_BY_PYDANTIC = ("string_pattern_mismatch", "custom_error", "finite_number")
_NAMES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
_SIGNS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


class _Schema:
    """A model's JSON schema, and what it says of keys."""

    def __init__(self, model: type[pydantic.BaseModel]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of defaults that JSON cannot hold
            self.root: Node = model.model_json_schema()

    def members(self, node: Node) -> list[Node]:
        """The members of a union, also of nested ones, without references; any other node is its own only member."""
        if "$ref" in node:
            node = self.root["$defs"][node["$ref"].rpartition("/")[2]]
        inner = node.get("anyOf") or node.get("oneOf") or ()
        return [found for member in inner for found in self.members(member)] or [node]

    def sections(self, node: Node | None) -> list[Node]:
        return [member for member in self.members(node) if "properties" in member] if node else []

    def tagged(self, node: Node) -> Node:
        """The tagged union that the node is, or is next to null; else the node."""
        return next((member for member in node.get("anyOf", ()) if "discriminator" in member), node)

    def tags(self, node: Node) -> list[Any]:
        mapping = node["discriminator"]["mapping"]  # sorted; the union is in the order of the table
        return [tag for member in node["oneOf"] for tag, section in mapping.items() if section == member["$ref"]]

    def follow(self, location: Sequence[int | str]) -> tuple[Key, Node | None, Key | None]:
        """The key at pydantic's location, its node, and the key of the last plain union on the way."""
        key: Key = ()
        node: Node | None = self.root
        union_key: Key | None = None
        for part in location:
            members = [member for member in self.members(node) if member.get("type") != "null"] if node else []
            if node and "discriminator" in node:
                reference = node["discriminator"]["mapping"].get(str(part))
                node = {"$ref": reference} if reference else None
            elif len(members) > 1:
                union_key = key
                node = next((member for member in members if member.get("title") == part), None)
            else:
                key = (*key, str(part))
                node = self.entry(members[0], part) if members else None
        return key, node, union_key

    def entry(self, node: Node, part: int | str) -> Node | None:
        """The node of an entry of a section, list or mapping."""
        if "properties" in node:
            found = node["properties"].get(str(part))
        elif "prefixItems" in node:
            found = node["prefixItems"][part] if isinstance(part, int) and part < len(node["prefixItems"]) else None
        else:
            found = node.get("items") or node.get("additionalProperties")
        return self.tagged(found) if isinstance(found, dict) else None

    def choices(self, node: Node) -> list[Any]:
        """The values of Literals and Enums."""
        return [value for member in self.members(node) for value in _fixed(member)]

    def describe(self, node: Node) -> str:
        """`a whole number >= 1 or 'auto'`; empty where the type has no plain name."""
        wanted = [_one_of(choices)] if (choices := self.choices(node)) else []
        wanted += [self.describe_one(member) for member in self.members(node) if not _fixed(member)]
        return " or ".join(dict.fromkeys(wanted)) if all(wanted) else ""

    def describe_one(self, node: Node) -> str:
        kind = node.get("type", "")
        if "properties" in node:
            return "a section of `key: value` lines"
        if kind == "object":
            inner = node.get("additionalProperties")
            return "a mapping" + (f" whose values are each {self.describe(inner)}" if isinstance(inner, dict) else "")
        if kind == "array":
            entries = node.get("prefixItems") or [node.get("items", {})]
            each = self.describe(entries[0]) if all(entry == entries[0] for entry in entries) else ""
            count = f" of {len(entries)}" if "prefixItems" in node else ""
            count = count or (f" of at least {node['minItems']}" if node.get("minItems") else "")
            return f"a list{count}{f', each {each}' if each else ''}"
        if kind == "string":
            shortest = node.get("minLength", 0)
            text = "a path" if node.get("format") == "path" else "text"
            long = {0: "", 1: " that is not empty"}.get(shortest, f" of at least {shortest} characters")
            return text + long
        bounds = [f"{sign} {node[name]:g}" for name, sign in _SIGNS.items() if name in node]
        step = f", a multiple of {node['multipleOf']}" if "multipleOf" in node else ""
        return _NAMES.get(kind, "") + (" " + " and ".join(bounds) if bounds else "") + step

    def placed(self, key: str, values: Any) -> str:
        """With which choice a key belongs to its section, if not with the config's; empty if the config accepts it."""
        node: Node | None = self.root
        parts = tuple(key.split("."))
        for n, part in enumerate(parts):
            if node and "discriminator" in node:
                choice = (*parts[:n], node["discriminator"]["propertyName"])
                given, mapping = value_at(values, choice), node["discriminator"]["mapping"]
                known, of = isinstance(given, str) and given in mapping, dotted(choice)
                fitting = [tag for tag in self.tags(node) if self.entry(self.members({"$ref": mapping[tag]})[0], part)]
                if fitting and known and given not in fitting:
                    return f"{of}={given} has no {part}; it belongs to {of}={', '.join(fitting)}"
                node = {"$ref": mapping[given]} if known else None
            sections = self.sections(node)
            node = self.entry(sections[0], part) if sections else None
        return ""

    def unknown(self, key: Key, section: Node | None, values: Any, renamed: Mapping[str, str]) -> str:
        name = key[-1]
        allowed = list(self.sections(section)[0]["properties"]) if self.sections(section) else []
        ours = renamed.get(name) or renamed.get(name.replace("-", "_"))
        if elsewhere := self.placed(dotted(key), values):
            return f"unknown key; {elsewhere}"
        if ours == dotted(key):
            ours = None  # it would lead in a circle
        near = did_you_mean(name, allowed)
        elsewhere = (
            {dotted(path) for path in self.keys(self.root) if path[-1] == name and path != key} if not near else ()
        )
        if ours or len(elsewhere) == 1:
            ours = ours or next(iter(elsewhere))
            return f"unknown key; {ours if ' ' in ours else self.placed(ours, values) or f'here it is {ours}'}"
        return f"unknown key.{near} Allowed: {', '.join(allowed)}"

    def missing(self, key: Key, node: Node | None) -> str:
        if node and "discriminator" in node:
            tag = dotted((*key, node["discriminator"]["propertyName"]))
            return f"missing section; it needs {tag}: {_one_of(self.tags(node))}"
        if sections := self.sections(node):
            needed = sections[0].get("required", ())
            return f"missing section; it needs {', '.join(dotted((*key, name)) for name in needed) or 'to be there'}"
        wanted = self.describe(node) if node else ""
        what = (node or {}).get("description", "").split(". ")[0].replace("\n", " ").rstrip(".").replace("`", "'")
        wanted = f": expected {wanted}" if wanted else ""
        return f"missing{wanted}" + (f", {what[0].lower()}{what[1:]}" if what else "")

    def keys(self, node: Node, above: Key = ()) -> Iterator[Key]:
        for section in self.sections(node):
            for name, inner in section["properties"].items():
                yield (*above, name)
                if len(above) < 4:  # models may contain themselves
                    yield from self.keys(inner, (*above, name))


def _fixed(node: Node) -> list[Any]:
    return [node["const"]] if "const" in node else node.get("enum", [])


def _expected(wanted: str, given: Any, choices: Sequence[Any] = ()) -> str:
    hint = did_you_mean(given, [str(choice) for choice in choices]) if isinstance(given, str) else ""
    if wanted.startswith("text") and isinstance(given, int | float | list | Mapping):
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
