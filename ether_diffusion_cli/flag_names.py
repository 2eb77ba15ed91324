"""Messages of the package name settings as configs spell them; here they name the flags that a command has instead."""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

COUNTERPARTS: Mapping[str, tuple[str, ...]] = {
    "base_model": ("base",),
    "data.condition": ("preprocessor",),
    "data.dataset_dir": ("dataset", "folder"),
    "data.instance_dir": ("folder",),
}
"""Options that stand for a setting of another name, where a command has them."""
DIGEST = "condition"
"""With a value it is what images record of their condition, not the option of that name."""
# How messages name a setting: `data.split` anywhere, `steps = 3` with a value, or `base_model: ` where a line begins.
_WITH_SECTION = r"(?P<dotted>(?:adapter|data)\.\w+)(?P<set> ?= ?)?"
_WITH_VALUE = r"(?P<name>[a-z][a-z_]*)(?P<equals> ?= ?)"
_AT_START = r"^(?P<first>[a-z][a-z_]*)(?=: )"
_MENTION = re.compile(rf"(?<![\w./'\"=-])(?:{_WITH_SECTION}|{_WITH_VALUE}|{_AT_START})", re.M)


@contextmanager
def naming_flags(arguments: Namespace) -> Iterator[None]:
    """Within the block, in which a command does its work, a UserError names flags in the place of settings.

    Commands that take settings (`section.key=value`) keep the settings' names.
    """
    from ether_diffusion.errors import UserError

    try:
        yield
    except UserError as error:
        if not hasattr(arguments, "overrides"):
            error.args = (with_flags(str(error), arguments),)
        raise


def with_flags(message: str, arguments: Namespace) -> str:
    """A message in which each setting is the command's option of the same meaning, where it has one.

    `data.condition=labels` becomes `--condition labels`. A fault of a setting, `base_model: …`, is the flag's only if
    the flag was given: else the value is a config's.
    """
    parser: ArgumentParser = arguments.parser
    options = {action.dest: action for action in parser._actions}

    def option(key: str) -> Action | None:
        names = (*COUNTERPARTS.get(key, ()), key.rpartition(".")[2])
        return next((options[name] for name in names if name in options), None)

    def renamed(found: re.Match[str]) -> str:
        key = found["dotted"] or found["name"] or found["first"]
        action = option(key)
        if action is None or found["name"] == DIGEST:
            return found[0]
        if found["equals"] == " = " and getattr(arguments, "requests", None) is not None:
            return found[0]  # a row of the file states it
        if found["first"] and getattr(arguments, action.dest, None) == parser.get_default(action.dest):
            return found[0]
        flag = action.option_strings[0] if action.option_strings else str(action.metavar)
        return f"{flag} " if found["set"] or found["equals"] else flag

    text = _MENTION.sub(renamed, message)
    switches = [name for action in parser._actions if action.nargs == 0 for name in action.option_strings]
    return re.sub(rf"({'|'.join(map(re.escape, switches))}) true\b", r"\1", text)
