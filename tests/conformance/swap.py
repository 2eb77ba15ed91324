"""A pytest plugin that points PEFT's tests at ETHER: every table of methods in them is replaced by one of ours."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import peft
import pytest

IS_PATCHED = "EtherConfig" in peft.__all__
"""Whether tests/test_peft_patch.py has made ETHER a part of this PEFT. Tests with pipelines then stay out."""
EtherConfig: Any = vars(peft if IS_PATCHED else importlib.import_module("ether_diffusion"))["EtherConfig"]

ETHER = {"variant": "ether"}
ETHER_BLOCKS = {"variant": "ether", "sides": "both", "num_blocks": 2}
ETHER_PLUS = {"variant": "ether_plus"}
ETHER_PLUS_BLOCKS = {"variant": "ether_plus", "sides": "in", "num_blocks": 5}

# Upstream's small models: MLP (10 -> 20 -> 2), Conv2d (5 -> 10 channels, 10 -> 2) and Conv2d2 (10 -> 40, 8 -> 32
# channels). Those with one channel, groups, 1d or 3d kernels and embeddings hold nothing that ETHER adapts.
CUSTOM = [
    (f"{model} {variant} {number}", model, EtherConfig, {**settings, **rest})
    for number, (model, settings) in enumerate(
        [
            ("MLP", {"target_modules": "lin0"}),
            ("MLP", {"target_modules": ["lin0"]}),
            ("MLP", {"target_modules": ["lin0", "lin1"]}),
            ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
            ("Conv2d", {"target_modules": ["conv2d"]}),
            ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
            ("Conv2d2", {"target_modules": ["lin0", "conv2d"]}),
        ]
    )
    for variant, rest in (("ETHER", ETHER), ("ETHER+", ETHER_PLUS))
] + [
    ("MLP ETHER blocks", "MLP", EtherConfig, {"target_modules": ["lin0"], **ETHER_BLOCKS}),
    ("MLP ETHER+ blocks", "MLP", EtherConfig, {"target_modules": ["lin0"], **ETHER_PLUS_BLOCKS}),
    ("Conv2d2 ETHER blocks", "Conv2d2", EtherConfig, {"target_modules": ["conv2d"], **ETHER_BLOCKS}),
]

PAIRS = [
    (f"{name} {kind}", "ether", EtherConfig, *({"target_modules": t, "init_weights": False, **rest} for t in targets))
    for name, rest in (("ETHER", ETHER), ("ETHER+", ETHER_PLUS))
    for kind, targets in (("same", (["lin0"], ["lin0"])), ("different", (["lin0"], ["lin1"])))
]

TEXT_ENCODER = {"target_modules": ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"], "init_weights": False}
UNET = {
    "target_modules": ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "init_weights": False,
}
PIPELINES = [
    (EtherConfig, {"text_encoder": {**TEXT_ENCODER, **rest}, "unet": {**UNET, **rest}})
    for rest in (ETHER, ETHER_PLUS, ETHER_BLOCKS)
]

MIXED = "test_name,config0,config1"
"""The arguments of upstream's tests of `forward(adapter_names=…)`, where ETHER takes the places of LoRA adapters."""
NOT_ADAPTED = ("emb", "conv1d", "mha")

# The arguments of a parametrised test tell which table it runs over.
TABLES: dict[str, list[Any]] = {
    "test_name,model_id,config_cls,config_kwargs": CUSTOM,
    "test_name,tuner_method,config_cls,config_kwargs_1,config_kwargs_2": PAIRS,
    **({} if IS_PATCHED else {"config_cls,config_kwargs": PIPELINES}),
    "config_cls": [EtherConfig],
}


def mixed(rows: list[Any]) -> list[Any]:
    """Rows of upstream's tests of mixed batches: of each with LoRA, two with ETHER; others left out."""
    found = []
    for name, *configs in rows:
        if isinstance(configs[0], EtherConfig):  # a table that several tests share
            found.append((name, *configs))
        elif name.startswith("LoRA") and not any(
            layer in config.target_modules for config in configs for layer in NOT_ADAPTED
        ):
            for title, variants in (
                ("ETHER, ETHER+", (ETHER, ETHER_PLUS)),
                ("ETHER+, ETHER+", (ETHER_PLUS, ETHER_PLUS)),
            ):
                ours = [
                    EtherConfig(
                        target_modules=config.target_modules,
                        modules_to_save=config.modules_to_save,
                        init_weights=False,
                        **variant,
                    )
                    for config, variant in zip(configs, variants, strict=True)
                ]
                found.append((name.replace("LoRA", title), *ours))
    return found


_seen: set[str] = set()


def pytest_configure() -> None:
    # Tests that we do not run load data sets; importing the package is all that the others need of it.
    if importlib.util.find_spec("datasets") is None:
        stand_in: Any = ModuleType("datasets")
        stand_in.__spec__ = ModuleSpec("datasets", None)
        stand_in.load_dataset = None
        sys.modules["datasets"] = stand_in


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for mark in metafunc.definition.iter_markers("parametrize"):
        names, rows = mark.args
        names = names.replace(" ", "")
        if names in TABLES:
            rows[:] = TABLES[names]
            _seen.add(names)
        if names == MIXED:
            rows[:] = mixed(rows)
            _seen.add(names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unseen = {*TABLES, MIXED} - _seen
    if unseen:
        raise pytest.UsageError(f"No test of this PEFT runs over ({'), ('.join(unseen)}): `TABLES` needs an update.")
    ours = [
        item
        for item in items
        if _parameters(item).get("config_cls") is EtherConfig
        or isinstance(_parameters(item).get("config0"), EtherConfig)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


@pytest.fixture(autouse=True)
def _upstream_exceptions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where upstream treats a method by its name, name ours."""
    module = request.module
    if hasattr(module, "DeftConfig"):
        # The way out of the test that a fresh adapter is the identity is asked of DEFT's config alone.
        monkeypatch.setattr(module, "DeftConfig", EtherConfig)
        monkeypatch.setattr(EtherConfig, "para", property(lambda self: self.variant == "ether"), raising=False)


@pytest.fixture(scope="session", autouse=True)
def _local_pipeline() -> Any:
    """`tiny` in place of the pipeline that upstream takes from the hub."""
    if IS_PATCHED:
        yield
        return
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    from ether_diffusion.models.bases import load_base

    base = load_base("tiny")  # by the method that is replaced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **__: copy.deepcopy(base).pipeline())
        yield


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec else {}
