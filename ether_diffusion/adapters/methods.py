"""The table of fine-tuning methods: an entry is a settings class, which states all facts that the package needs."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ether_diffusion.config_tables import EntryOf

from .method_settings import MethodSettings, peft_type_of
from .own_methods import EtherPlusSettings, EtherSettings, MagnitudeSettings, NaiveSettings
from .peft_methods import (
    BoftSettings,
    DeloraSettings,
    DoraSettings,
    HraSettings,
    LoraSettings,
    OftSettings,
    VeraSettings,
)
from .whole_module_methods import ControlNetSettings, FullSettings, NoAdapterSettings

M = TypeVar("M", bound=type[MethodSettings])

METHODS: dict[str, type[MethodSettings]] = {}

AdapterSettings = Annotated[MethodSettings, EntryOf(METHODS, "method")]
"""One of the table's entries, by its `method`: the type of a config's section."""


def register_method(settings: M) -> M:
    """Add a method to the table, so that configs, training, loading and generation accept it. Also a class decorator.

    Args:
        settings: Has a field `method: Literal["its_name"] = "its_name"`, and a default for every other field. PEFT
            knows the class of its `peft_config()` (`ether_diffusion.ether.registry.register`). A variant of a method in
            the table overrides `recognises` to tell its PEFT configs from those of that method.

    Raises:
        ValueError: another method has the name; a fact is missing; PEFT does not know the method; or `recognises` fails
            for its own config, or is true for the config of a method in the table.
    """
    name = settings.model_fields["method"].default
    if METHODS.get(name) is settings:
        return settings
    problem = _problem(name, settings)
    if problem is not None:
        raise ValueError(f"{settings.__name__}: {problem}")
    METHODS[name] = settings
    return settings


def _problem(name: Any, settings: type[MethodSettings]) -> str | None:
    """Why a settings class cannot be an entry; None: it can."""
    if not isinstance(name, str):
        return 'expected a field `method: Literal["its_name"] = "its_name"`.'
    if name in METHODS:
        return f"the name {name!r} is taken by {METHODS[name].__name__}."
    missing = [fact for fact in ("title", "learning_rates") if not hasattr(settings, fact)]
    if missing:
        return f"it does not state {' and '.join(missing)}."
    if not settings.peft_type:
        return None
    if settings.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return f"PEFT knows no {settings.peft_type!r}; enter it with ether_diffusion.ether.registry.register first."
    if not settings.recognises(settings().peft_config()):
        return "`recognises` is false for its own peft_config()."
    others = [other for other, entry in METHODS.items() if entry.peft_type == settings.peft_type]
    claimed = next((other for other in others if settings.recognises(METHODS[other]().peft_config())), None)
    return claimed and f"`recognises` is true for the configs of {claimed!r}."


for _entry in (
    EtherSettings,
    EtherPlusSettings,
    OftSettings,
    NaiveSettings,
    MagnitudeSettings,
    LoraSettings,
    DoraSettings,
    BoftSettings,
    HraSettings,
    VeraSettings,
    DeloraSettings,
    FullSettings,
    ControlNetSettings,
    NoAdapterSettings,
):
    register_method(_entry)


def method_of(config: PeftConfig) -> type[MethodSettings] | None:
    """The method of a PEFT config, the latest in the table that recognises it; None: a method of PEFT alone."""
    return next((method for method in reversed(METHODS.values()) if method.recognises(config)), None)


def facts_of(config: PeftConfig) -> type[MethodSettings]:
    """The facts of a PEFT config's method; the defaults for a method that is not in the table."""
    return method_of(config) or MethodSettings


def method_title(config: PeftConfig) -> str:
    """The method's name for people; PEFT's for a method that is not in the table."""
    method = method_of(config)
    return method.title if method else peft_type_of(config)


def folder_of(method: object) -> str:
    """The subfolder of a run that holds a method's weights, by its name in a config; empty for `none`."""
    return METHODS[method].folder if isinstance(method, str) and method in METHODS else MethodSettings.folder
