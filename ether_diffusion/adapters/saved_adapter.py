"""Saved adapters: PEFT folders, read once and strictly into an object with everything that loading needs.

An adapter folder may hold others: `text_encoder/` and `text_encoder_2/`, the adapters of text encoders, and `before/`,
the adapter that was merged into the base before this one was trained. That one may hold a `before/` of its own: the
innermost acts first. With the base, one folder is all that generation needs.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.files import CHECKPOINTS, Digest, digest_of_json, list_checkpoints
from ether_diffusion.input_files import read_bytes
from ether_diffusion.weight_files import loading

from .certificate import CERTIFICATE, Certificate, read_certificate
from .methods import METHODS, facts_of, method_of, method_title

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT_ENCODER, BEFORE = "text_encoder", "before"
TEXT_ENCODERS = (TEXT_ENCODER, "text_encoder_2")
"""By their names in diffusers' pipelines."""
VAE = "vae.json"
"""Present where another VAE than the base's own was trained with."""
PREFIX = "base_model.model."
"""PeftModel's prefix of its keys. Without it PeftModel.from_pretrained would load nothing, with a mere warning."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NAME, _NAMES = "text", "a list of texts"
# The kinds of values that are used before PEFT sees them, or that PEFT does not check.
_KINDS = {
    "base_model_name_or_path": (_NAME,),
    "revision": (_NAME,),
    "target_modules": (_NAME, _NAMES),
    "exclude_modules": (_NAME, _NAMES),
    "modules_to_save": (_NAMES,),
}
_NOT_FUNCTION = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
_UNORDERED = ("exclude_modules", "modules_to_save", "target_modules")


@dataclass(frozen=True, eq=False, repr=False)
class SavedAdapter:
    """An adapter folder, read once: everything that loading it takes."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]
    """By PEFT's file keys, on the CPU."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The values of adapter_config.json that the adapter's function depends on: all but base, versions and modes."""
    weights_digest: str = ""
    """SHA-256 of the files of weights: its own, its text encoders', then those of the adapters before it."""
    vae: str | None = None
    """The VAE that took the place of the base's own."""
    text_encoders: Mapping[str, SavedAdapter] = field(default_factory=dict)
    """The adapters of text encoders that were trained with this one, by the names of these."""
    before: PreviousAdapter | None = None
    """The adapter that was merged into the base before this one was trained."""
    certificate: Certificate | None = None
    """What was checked when it was saved; None: another program saved it, or an earlier version."""

    @property
    def method(self) -> str:
        """The method's name for people, after those of the adapters before: `OFT + Magnitude`."""
        return " + ".join(method_title(phase.config) for phase in self.phases)

    @property
    def phases(self) -> list[SavedAdapter]:
        """The adapters before this one, in the order in which they act, and this one last."""
        return [*(self.before.phases if self.before else ()), self]

    @property
    def has_scale(self) -> bool:
        """Whether its strength can be set between 0 and 1. If not, a scale of 0 means to leave the adapter out."""
        return facts_of(self.config).has_scale and not getattr(self.config, "modules_to_save", None)

    @property
    def text_encoder(self) -> SavedAdapter | None:
        """The adapter of the only, or the first, text encoder."""
        return self.text_encoders.get(TEXT_ENCODER)

    @property
    def text_part(self) -> SavedAdapter:
        """`text_encoder`, for callers that need one; UserError: there is none."""
        return self.part(TEXT_ENCODER)

    def part(self, text_encoder: str) -> SavedAdapter:
        """The adapter of the text encoder of this name. Raises UserError: there is none."""
        if text_encoder not in self.text_encoders:
            raise UserError(f"{self.folder} holds no {text_encoder}/; expected a run of adapter.text_encoder=true.")
        return self.text_encoders[text_encoder]

    @property
    def base_model(self) -> str | None:
        return self.config.base_model_name_or_path

    @property
    def revision(self) -> str | None:
        """The base's branch, tag or commit."""
        return self.config.revision

    @property
    def parameters(self) -> int:
        """Number of trained parameters, with those of the adapters before; without frozen ones that are saved too."""
        return sum(phase.own_parameters for phase in self.phases)

    @property
    def own_parameters(self) -> int:
        """The same without the adapters before."""
        is_trained = facts_of(self.config).is_trained
        return sum(tensor.numel() for key, tensor in self.tensors.items() if is_trained(key))

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines its function: the weights, and the settings of each part."""
        parts = [part for phase in reversed(self.phases) for part in (phase, *phase.text_encoders.values())]
        return digest_of_json([self.weights_digest, *(part.settings for part in parts)], sort_keys=True)

    def __repr__(self) -> str:
        facts = f"{self.method}, {self.parameters:,} parameters, base {self.base_model}"
        return f"{type(self).__name__}({str(self.folder)!r}: {facts})"

    def __deepcopy__(self, memo: Any) -> SavedAdapter:
        return self  # it is read-only, and models that keep one are copied


@dataclass(frozen=True, eq=False, repr=False)
class PreviousAdapter(SavedAdapter):
    """An adapter that is merged into a base before another one is trained on it, and is saved again with that one."""

    files: dict[str, bytes] = field(default_factory=dict)
    """The content of its folder, by path, without `before/`, which belongs to the adapter before it."""

    def write(self, folder: Path) -> None:
        """Write its files, and those of the adapters before it, into a folder that does not exist yet."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        if self.before is not None:
            self.before.write(folder / BEFORE)


def find_adapter(path: str | Path) -> Path:
    """The PEFT folder in a run folder, in the last of its checkpoints, or the folder itself. UserError: none there."""
    path = Path(path)
    inside = [path, path / "adapter", *(step / "adapter" for step in reversed(list_checkpoints(path / CHECKPOINTS)))]
    found = next((folder for folder in inside if (folder / CONFIG).is_file()), None)
    if found in inside[2:] and inside[1].is_dir():  # the last checkpoint's would be another one
        raise UserError(f"{inside[1] / CONFIG} is missing.")
    if found is not None:
        return found
    kind = "is not a folder" if not path.is_dir() else "holds no adapter_config.json, nor does its folder adapter/"
    raise UserError(f"{path} {kind}; expected a run folder, a checkpoint folder of a run, or a PEFT adapter folder.")


def read_adapter(path: str | Path) -> SavedAdapter:
    """Read a saved adapter without a model. Nothing of it is read from the disk again.

    Args:
        path: A run folder, a checkpoint folder, or a PEFT folder.

    Raises:
        UserError: no adapter there, unreadable files, an unknown method, or numbers that are not finite.
    """
    folder = find_adapter(path)
    parts = [folder / part / name for part in (".", *TEXT_ENCODERS) for name in (CONFIG, WEIGHTS, VAE, CERTIFICATE)]
    return SavedAdapter(folder, **_fields(folder, _contents(folder, parts)))


def read_previous_adapter(path: str | Path) -> PreviousAdapter:
    """Read an adapter that is to be merged into a base, with its files. Arguments and errors: see `read_adapter`."""
    folder = find_adapter(path)
    inside = (path for path in sorted(folder.rglob("*")) if path.relative_to(folder).parts[0] != BEFORE)
    files = _contents(folder, inside)
    return PreviousAdapter(folder, **_fields(folder, files), files=files)


def _contents(folder: Path, paths: Iterable[Path]) -> dict[str, bytes]:
    """The contents of the paths that are files, by their paths in the folder."""
    with loading(f"{folder}: cannot be read"):
        return {
            path.relative_to(folder).as_posix(): read_bytes(path)
            for path in paths
            if path.exists() and not path.is_dir()
        }


def _fields(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of a `SavedAdapter` from the contents of its folder. Reads its `before/`."""
    before = read_previous_adapter(folder / BEFORE) if (folder / BEFORE).is_dir() else None
    text_encoders = {}
    for part in TEXT_ENCODERS:
        inside = {name.removeprefix(f"{part}/"): c for name, c in files.items() if name.startswith(f"{part}/")}
        if inside:
            text_encoders[part] = SavedAdapter(folder / part, **_fields(folder / part, inside))
    values = _read_config(folder, files)
    with loading(f"{folder / CONFIG}: cannot be read"):
        config = PeftConfig.from_peft_type(**copy.deepcopy(values))
    weights_digest = Digest().update(*_weights(files, before)).hex()
    certificate = read_certificate(files[CERTIFICATE]).of(weights_digest) if CERTIFICATE in files else None
    return {
        "config": config,
        "tensors": _read_tensors(folder, files, config),
        "settings": {
            key: sorted(value) if key in _UNORDERED and isinstance(value, list) else value
            for key, value in values.items()
            if key not in _NOT_FUNCTION
        },
        "weights_digest": weights_digest,
        "vae": _read_vae(folder / VAE, files[VAE]) if VAE in files else None,
        "text_encoders": text_encoders,
        "before": before,
        "certificate": certificate,
    }


def _read_vae(path: Path, content: bytes) -> str | None:
    name = _object(path, content).get("vae")
    if name is not None and not isinstance(name, str):
        raise UserError(f"{path}: vae is {name!r:.60}; expected {_NAME}.")
    return name


def _weights(files: Mapping[str, bytes], before: PreviousAdapter | None) -> Iterator[bytes]:
    """The files of weights of an adapter, of its text encoders', and of the adapters before it."""
    yield from (files[name] for name in (WEIGHTS, *(f"{part}/{WEIGHTS}" for part in TEXT_ENCODERS)) if name in files)
    if before is not None:
        yield from _weights(before.files, before.before)


def _read_config(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The values of an adapter_config.json of a method that PEFT knows."""
    path = folder / CONFIG
    if CONFIG not in files:
        raise UserError(f"{path} is missing.")
    values = _object(path, files[CONFIG])
    values.pop("runtime_config", None)  # PEFT drops it, too
    method = values.get("peft_type")
    if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(str(getattr(key, "value", key)) for key in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise UserError(f"{path}: unknown method {method!r}; known: {known}.")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[method]  # pyright: ignore[reportArgumentType]
    unknown = sorted(values.keys() - {setting.name for setting in dataclasses.fields(kind)})
    if unknown and kind.__module__.startswith("ether_diffusion."):  # PEFT would drop it, with a warning
        raise UserError(f"{path}: unknown setting {unknown[0]!r}; a later version of ether_diffusion may know it.")
    for key, kinds in _KINDS.items():
        if values.get(key) is not None and _kind(values[key]) not in kinds:
            raise UserError(f"{path}: {key} is {values[key]!r:.60}; expected {' or '.join(kinds)}.")
    return values


def _object(path: Path, content: bytes) -> dict[str, Any]:
    """The values in a JSON file that was read already."""
    with loading(f"{path}: cannot be read"):
        values = json.loads(content.decode("utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {values!r:.60}.")
    return values


def _kind(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _NAMES
    return _NAME if isinstance(value, str) else "another value"


def _read_tensors(folder: Path, files: Mapping[str, bytes], config: PeftConfig) -> dict[str, Tensor]:
    if WEIGHTS not in files:
        raise UserError(f"{folder}: the adapter's {WEIGHTS} is missing.")
    with loading(f"{folder / WEIGHTS}: cannot be read"):
        tensors = safetensors.torch.load(files[WEIGHTS])
    wrong = {key: tensor.dtype for key, tensor in tensors.items() if tensor.dtype not in _FLOATS}
    if wrong and method_of(config):  # methods that PEFT alone knows may save integers
        allowed, key = ", ".join(map(_shown, _FLOATS)), min(wrong)
        raise UserError(f"{folder / WEIGHTS}: {key} is {_shown(wrong[key])}; an adapter's tensors are {allowed}.")
    _check_method(folder / CONFIG, config, tensors)
    _check_sizes(folder / CONFIG, config, tensors)
    bad = [key for key in tensors.keys() - wrong.keys() if not torch.isfinite(tensors[key]).all()]
    if bad:
        raise UserError(f"{folder}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity, e.g. {min(bad)}.")
    return tensors


def _check_method(path: Path, config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Refuse the settings of one method over the tensors of another one that PEFT has under the same name."""
    method = method_of(config)
    if method is None:
        return
    for other in METHODS.values():
        if other.own_keys and other.peft_type == method.peft_type:
            found = any(fnmatchcase(key, other.own_keys) for key in tensors)
            if found != issubclass(method, other):
                has = f"has {other.title}'s tensors" if found else f"lacks {other.title}'s tensors ({other.own_keys})"
                raise UserError(f"{path}: these are settings of {method.title}, but {WEIGHTS} {has}.")


def _check_sizes(path: Path, config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Refuse a rank or a number of blocks for which there is no tensor: PEFT would ask for the memory."""
    largest = max([10_000, *(size for tensor in tensors.values() for size in tensor.shape)])
    for key, value in config.to_dict().items() if method_of(config) else ():
        if isinstance(value, int) and value > largest and "prng" not in key:
            raise UserError(f"{path}: {key} is {value!r:.40}; no tensor of the adapter is as large.")


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_prefix(key: str) -> str:
    """The key of an adapter's tensor in PEFT's files."""
    return key if key.startswith("base_model.") else PREFIX + key


def previous_adapter(model: nn.Module) -> PreviousAdapter | None:
    """The adapter that was merged into a model before its current one was attached; None: there is none."""
    return getattr(model, "_previous_adapter", None)


def set_previous_adapter(model: nn.Module, previous: PreviousAdapter | None) -> None:
    """Record the adapter that was merged into a model, to be saved together with one that is trained on it."""
    mark: Any = model
    mark._previous_adapter = previous
