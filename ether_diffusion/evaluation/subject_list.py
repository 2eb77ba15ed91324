"""`prompts_and_classes.txt` of the DreamBooth data set: the classes of subjects, and two lists of prompts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.errors import UserError
from ether_diffusion.input_files import read_text

from .protocols import SubjectProtocol

FILE = "prompts_and_classes.txt"
LIVE = {"cat", "dog"}
"""The classes of live subjects in the data set. The file has their prompts, but does not name them."""


@dataclass(frozen=True)
class SubjectList:
    """The content of the file.

    Attributes:
        classes: By subject.
        prompts: Templates by kind, `object` and `live`; `{subject}` stands for identifier and class.
    """

    path: Path
    classes: dict[str, str]
    prompts: dict[str, tuple[str, ...]]


def read_subject_list(path: str | Path) -> SubjectList:
    """Read the file, with any line ends, quotes, blank lines and trailing commas.

    Raises:
        UserError: a line of another format, a missing part, or a subject or prompt that occurs twice.
    """
    path = Path(path)
    text = read_text(path)
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {}
    for where, section, line in _lines(path, text):
        if section == "classes":
            subject, comma, name = (part.strip() for part in line.partition(","))
            if not (subject and comma and name) or subject in classes:
                raise UserError(f"{where}: {line!r}; expected SUBJECT,CLASS, each subject once.")
            classes[subject] = name
        else:
            template = _template(where, line)
            if template in prompts.setdefault(section, []):
                raise UserError(f"{where}: {line!r} is in its list twice.")
            prompts[section].append(template)
    missing = [name for name, found in (("classes", classes), *((k, prompts.get(k)) for k in KINDS)) if not found]
    if missing:
        raise UserError(f"{path}: no {' and no '.join(missing)} in it; expected subjects with classes, and two lists.")
    return SubjectList(path, classes, {kind: tuple(prompts[kind]) for kind in KINDS})


def check_subject_list(protocol: SubjectProtocol, found: SubjectList) -> None:
    """Check that a protocol with the data set's two lists of prompts agrees with the file in prompts and classes.

    Raises:
        UserError: the first difference.
    """
    if not set(KINDS) <= set(protocol.prompts):
        return
    for kind in KINDS:
        ours, theirs = protocol.prompts[kind], found.prompts[kind]
        if ours != theirs:
            pairs = zip((*ours, "(none)"), (*theirs, "(none)"), strict=False)
            our, their = next(pair for pair in pairs if pair[0] != pair[1])
            raise UserError(f"{found.path}: {kind} prompts: {their!r}; {protocol.name} has {our!r} in its place.")
    for subject, entry in protocol.subjects.items():
        theirs = found.classes.get(subject)
        if theirs != entry.class_name:
            raise UserError(f"{found.path}: {subject} is {theirs!r}; {protocol.name} has {entry.class_name!r}.")
        kind = "live" if theirs in LIVE else "object"
        if entry.prompts != kind:
            raise UserError(f"{protocol.name}: {subject}, a {theirs}, has {entry.prompts} prompts; expected {kind}.")


KINDS = ("object", "live")

_HEADINGS = {
    "classes": "classes",
    "prompts": "",
    "object prompts": "object",
    "live subject prompts": "live",
}
_IGNORED = re.compile(r"subject_name\s*,\s*class|prompt_list\s*=\s*\[|\]", re.IGNORECASE)


def _lines(path: Path, text: str) -> Iterator[tuple[str, str, str]]:
    """Every line with content: its place, its section, and the line."""
    section = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        heading = line.rstrip(":").lower()
        if heading in _HEADINGS:
            section = _HEADINGS[heading]
        elif line and not _IGNORED.fullmatch(line):
            if not section:
                raise UserError(f"{path}:{number}: {line!r} is under no heading; expected Classes or … Prompts.")
            yield f"{path}:{number}", section, line


def _template(where: str, line: str) -> str:
    """`'a {0} {1} in the snow'.format(unique_token, class_token),` -> `a {subject} in the snow`."""
    match = re.fullmatch(r"""(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(\.format\([^()]*\))?\s*,?""", line)
    if match is None:
        raise UserError(f"{where}: {line!r}; expected a prompt in quotes, with {{0}} {{1}} in it.")
    words = " ".join(ast.literal_eval(match["text"]).split())
    if words.count("{0} {1}") != 1 or re.search(r"[{}]", words.replace("{0} {1}", "")):
        raise UserError(f"{where}: {words!r}; expected {{0}} {{1}} in it once, for identifier and class.")
    return words.replace("{0} {1}", "{subject}")
