"""The config loader: a YAML file and `section.key=value` overrides become any frozen, strict pydantic model.

OmegaConf loads, merges and interpolates (`${section.key}`); pydantic validates; all faults are reported at once, one
line each, with the file and line, or the override, that they come from.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import config_faults
from .errors import UserError, did_you_mean, first_line
from .input_files import read_text

M = TypeVar("M", bound=pydantic.BaseModel)


class Settings(pydantic.BaseModel):
    """The base class of all settings: frozen, no unknown keys, finite numbers, `~` in paths expanded."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # which errors quote
    )
    # For a key such as `adapter.method`, on which the rest of its section depends: old value, new value -> the other
    # settings of the section that the file states and that still hold after an override replaces the key's value.
    carried_over: ClassVar[Mapping[str, Callable[[Any, Any], Collection[str]]]] = {}

    @pydantic.field_validator("*", mode="after")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        return at_home(value) if isinstance(value, Path) else value


def unquoted(word: str) -> pydantic.BeforeValidator:
    """Let a setting have this word, such as `no` or `off`, without quotes, where YAML reads it as false."""
    return pydantic.BeforeValidator(lambda value: word if value is False else value)


def at_home(path: Path) -> Path:
    """The path with a leading `~` expanded to the home folder.

    Raises:
        ValueError: `~name` of a user who does not exist.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


class ConfigError(UserError):
    """Faults of a config: `faults`, one line each, in the order of the file and then of the command line."""

    def __init__(self, *faults: str):
        super().__init__("\n".join(faults))
        self.faults = faults


def load_config(
    model: type[M],
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    more: Mapping[str, Sequence[str]] = {},
    renamed: Mapping[str, str] = {},
) -> M:
    """Read a config file (see `find_config`), apply the overrides, and validate the result as `model`.

    Overrides follow OmegaConf's dotlist: values are YAML (`1e-4` is a number, `[a, b]` a list, `key=` is null), a later
    one wins, a mapping is merged into its section, a list is replaced, and `list[0]=x` sets one entry. A new value of
    a key in `model.carried_over` also drops the other settings of its section that the file states.
    Types are strict: whole numbers become floats, lists tuples, and text paths and enums; nothing else is converted.

    Args:
        more: Overrides that follow those of the command line, by the place that messages name.
        renamed: Flags of other programs, each with the key of the same meaning here, or a sentence on why there is
            none, for the message on such a flag.

    Raises:
        ConfigError: All faults, one line each.
    """
    path = find_config(source)
    config, places = _read(path)
    choices: dict[str, Callable[[Any, Any], Collection[str]]] = getattr(model, "carried_over", {})
    chosen = {key: _value(config, key) for key in choices}
    given = [("command line", text) for text in overrides]
    given += [(where, text) for where, texts in more.items() for text in texts]
    faults = [fault for i, (where, text) in enumerate(given) if (fault := _override(config, places, text, i, where))]
    for key, carried_over in choices.items():
        new = _value(config, key)
        if new != chosen[key] and not isinstance(new, DictConfig | ListConfig):  # which the model refuses
            _leave_out(config, places, key, carried_over(chosen[key], new))
    values, refused = _resolved(config, places)
    faults = [_with_hint(fault, model, values, renamed) for fault in faults]
    faults += [_Fault(places.at(key), key, message) for key, message in refused.items()]

    settings = None
    try:
        # JSON mode is strict, yet converts text to a Path and a list to a tuple.
        settings = model.model_validate_json(json.dumps(values, default=str), strict=True)
    except pydantic.ValidationError as error:
        for key, message, is_missing in config_faults.explain(model, error, values, renamed):
            if any(key[: len(other)] == other or other[: len(key)] == key for other in refused):
                continue  # its value could not be resolved, which is in `refused`
            place = places.holding(key) if is_missing else places.at(key)
            origin = "" if is_missing else _interpolation_note(config, places, key)
            faults.append(_Fault(place, key, message + origin))
    if settings is None or faults:
        raise ConfigError(*(str(fault) for fault in sorted(faults, key=lambda fault: fault.place.order)))
    return settings


def find_config(source: str | Path) -> Path:
    """The file at a path, or of a shipped config such as `quickstart/dreambooth` (with or without `.yaml`)."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{source}: expected a YAML file, got a folder")
    folder = _shipped_folder()
    # configs/accelerate/ has accelerate's own files.
    files = [file for file in sorted(folder.glob("**/*.yaml")) if file.parent.name != "accelerate"]
    shipped = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    name = path.as_posix().removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    if name in shipped:
        return _near(shipped[name])
    raise ConfigError(
        f"no config {str(source)!r}: neither a file nor the name of a shipped config.{did_you_mean(name, shipped)}"
        f" Shipped: {', '.join(shipped) or 'none'}"
    )


def to_yaml(settings: pydantic.BaseModel) -> str:
    """The resolved config as YAML; `load_config` of it gives equal settings."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _shipped_folder() -> Path:
    """`configs/` next to this file in an installed package; in a checkout, the top-level folder."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def _near(path: Path) -> Path:
    """Relative to the working directory if it lies inside it, because messages show it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


Key = tuple[str, ...]
_OPENING = ("[", "{", "'", '"')


@dataclass(frozen=True)
class _Place:
    """The origin of a value: a line of the file, or an override (its text, and the key that it sets)."""

    where: str
    order: tuple[int, int]
    override: str = ""
    key: Key = ()


@dataclass(frozen=True)
class _Fault:
    place: _Place
    key: Key
    message: str

    def __str__(self) -> str:
        subject = config_faults.dotted(self.key) if self.key != self.place.key else ""
        return ": ".join(part for part in (self.place.where, self.place.override, subject, self.message) if part)


@dataclass
class _Places:
    """The place of each key."""

    file: str
    of: dict[Key, _Place] = field(default_factory=dict)

    def at(self, key: Key) -> _Place:
        """The place of a key, else of the nearest section around it, else of a key inside it."""
        above = (self.of[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.of)
        within = (place for known, place in self.of.items() if known[: len(key)] == key)
        return next(above, None) or next(within, None) or _Place(self.file, (0, 0))

    def holding(self, key: Key) -> _Place:
        """The line of the section that a missing key belongs to; the file alone if it has no such section."""
        place = self.of.get(key[:-1])
        return place if place and not place.override else _Place(self.file, (0, 0))

    def add_node(self, key: Key, node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if name.tag == "tag:yaml.org,2002:merge":
                    for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        self.add_node(key, merged)
            for name, value in node.value:
                if name.tag != "tag:yaml.org,2002:merge":
                    self._add_line((*key, str(name.value)), name)
                    self.add_node((*key, str(name.value)), value)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self._add_line((*key, str(i)), value)
                self.add_node((*key, str(i)), value)

    def add_override(self, key: Key, value: Any, place: _Place) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                self.add_override((*key, str(name)), inner, place)
        else:
            for known in [known for known in self.of if known[: len(key)] == key]:
                del self.of[known]
            for above in [key[:n] for n in range(1, len(key)) if key[:n] in self.of]:
                if not any(known != above and known[: len(above)] == above for known in self.of):
                    self.of[above] = place  # the override turns a plain value into a section
            self.of[key] = place

    def _add_line(self, key: Key, node: yaml.Node) -> None:
        line = node.start_mark.line + 1
        self.of[key] = _Place(f"{self.file}:{line}", (0, line))


def _read(path: Path) -> tuple[DictConfig, _Places]:
    try:
        text = read_text(path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected `key: value` lines at the top level")
        config = OmegaConf.load(io.StringIO(text)) if root is not None else OmegaConf.create()
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_fault(str(path), error)) from None
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path}: {first_line(error)}") from None
    except ConfigError:
        raise
    except UserError as error:
        raise ConfigError(str(error)) from None
    assert isinstance(config, DictConfig)
    places = _Places(str(path))
    if root is not None:
        places.add_node((), root)
    return config, places


def _yaml_fault(where: str, error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{where}: not valid YAML: {first_line(error)}"
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark else ""
    problem = error.problem or error.context or "syntax error"
    if match := re.match(r"found duplicate key (.*)", problem):
        return f"{where}{line}: {match[1]}: this key is given twice in its section"
    if "<document start>" in problem and not where:
        problem = "text follows the closing bracket or quote"
    if "character '\\t'" in problem:
        problem = "a tab; indent with spaces"
    return f"{where}{line}: not valid YAML: {problem}" + (
        f" ({error.context})" if error.context and error.context != problem else ""
    )


def _with_hint(fault: _Fault, model: type[pydantic.BaseModel], values: Any, renamed: Mapping[str, str]) -> _Fault:
    """The fault; of a flag of another program, with the key of the same meaning here."""
    flag, equals, value = fault.place.override.partition("=")
    ours = renamed.get(flag.strip().lstrip("-").replace("-", "_"))
    if not ours or not flag.startswith("-"):
        return fault
    hint = config_faults.hint(model, values, ours, f"{equals}{value}")
    return replace(fault, message=f"{fault.message}; {hint}")


def _override(config: DictConfig, places: _Places, text: str, index: int, where: str) -> _Fault | None:
    """Merge one override into the config; returns its fault if it has one."""
    name, equals, value = (part.strip() for part in text.partition("="))
    key = tuple(re.sub(r"\[(\w+)\]", r".\1", name).split("."))
    place = _Place(where, (1, index), text, key)
    if name.startswith("-"):
        return _Fault(place, key, "unknown option")
    if not equals:
        return _Fault(place, key, "expected section.key=value")
    if not all(key):
        return _Fault(place, key, "expected a key such as section.key before the '='")
    try:
        parsed = _parsed(value)
        OmegaConf.update(config, ".".join(key), parsed, merge=True, force_add=True)
    except yaml.YAMLError as error:
        fault = re.sub(r"^(:\d+)?: ", "", _yaml_fault("", error))
        quoted = shlex.quote(f"{name}={json.dumps(value, ensure_ascii=False)}")
        return _Fault(place, key, f"{fault}. If it is text, quote it: {quoted}")
    except (OmegaConfBaseException, ValueError, IndexError, TypeError, RecursionError) as error:
        return _Fault(place, key, first_line(error))
    places.add_override(key, parsed, place)
    return None


def _parsed(value: str) -> Any:
    """An override's value: what YAML reads as one value from its first character to its last, else the text itself.

    YAML would cut text at ` #`, and take `&x y`, `!x`, `*x`, `a: b`, `? a`, `- a` and `{a|b}` for its own syntax, which
    nobody means on a command line. Lists, mappings and quoted text are read as YAML.

    Raises:
        yaml.YAMLError: what begins as a list, a mapping or quoted text is not one.
    """
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
        is_whole = node is not None and node.end_mark.index == len(value) and value[0] not in "&!"
        if not is_whole and value[:1] in _OPENING:
            raise yaml.YAMLError("text follows the closing bracket or quote")
    except yaml.YAMLError:
        if value[:1] in _OPENING:
            raise
        return value
    if isinstance(node, yaml.MappingNode):
        is_whole &= all(inner.start_mark.index < inner.end_mark.index for _, inner in node.value)  # `{a|b}` has none
    is_block = node is not None and (
        getattr(node, "flow_style", None) is False or getattr(node, "style", "") in ("|", ">")
    )
    if value and (not is_whole or is_block):
        return value
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    assert isinstance(parsed, dict)
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return value if is_plain and isinstance(parsed["value"], str) else parsed["value"]


def _value(config: DictConfig, key: str) -> Any:
    """The value of a key; None if it has none or it cannot be resolved."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None


def _leave_out(config: DictConfig, places: _Places, key: str, carried: Collection[str]) -> None:
    """Drop a section's settings from the file, except the key itself, those carried over, and those of overrides."""
    path, _, choice = key.rpartition(".")
    section, above = OmegaConf.select(config, path), tuple(path.split("."))
    for name in [name for name in section if name != choice] if isinstance(section, DictConfig) else ():
        written = [known for known in places.of if known[: len(above) + 1] == (*above, name)]
        node: Any = section._get_node(name)
        kept = name in carried and node._value() is not None  # null: the default of the old value
        if not kept and not any(places.of[known].override for known in written):
            del section[name]
            for known in written:
                del places.of[known]


def _resolved(config: DictConfig, places: _Places) -> tuple[dict[str, Any], dict[Key, str]]:
    """The plain values with interpolations resolved, and the keys without a value, each with the reason."""
    refused: dict[Key, str] = {}

    def plain(node: DictConfig | ListConfig, key: Key) -> Any:
        names: list[Any] = list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))
        values = {}
        for name in names:
            inner = (*key, str(name))
            if OmegaConf.is_missing(node, name):
                refused[inner] = f"required: write it there or give {config_faults.dotted(inner)}=..."
                continue
            try:
                value = node[name]
                values[str(name)] = plain(value, inner) if isinstance(value, DictConfig | ListConfig) else value
            except (OmegaConfBaseException, RecursionError) as error:
                refused[inner] = f"cannot be resolved: {first_line(error)}"
        return values if isinstance(node, DictConfig) else list(values.values())

    return plain(config, ()), refused


def _interpolation_note(config: DictConfig, places: _Places, key: Key) -> str:
    """` (from ${seed}, configs/x.yaml:3)` if the value at `key` is interpolated."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    raw = config_faults.value_at(raw, key)
    if not isinstance(raw, str) or "${" not in raw:
        return ""
    target = re.fullmatch(r"\$\{([\w.]+)\}", raw)
    source = places.of.get(tuple(target[1].split("."))) if target else None
    return f" (from {raw}{f', {source.where}' if source else ''})"


class _Dumper(yaml.SafeDumper):
    """Writes values that PyYAML and OmegaConf, which recognises more forms of numbers, both read back as the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # else loading would interpolate it
    starts_as_word = re.match(r"[^\W\d]|/", literal)
    return dumper.represent_scalar("tag:yaml.org,2002:str", literal, style=None if starts_as_word else "'")


def _represent_list(dumper: _Dumper, values: list[Any]) -> yaml.Node:
    in_one_line = all(isinstance(value, int | float) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=in_one_line)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
