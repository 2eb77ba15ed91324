"""One line, `adapter.method`, changes the method and nothing else: every shipped config into every method."""

from __future__ import annotations

from typing import Any

import pytest

from ether_diffusion.config import ConfigError, load_config
from ether_diffusion.training import controllable, dreambooth

TASKS: dict[str, Any] = {"dreambooth": dreambooth, "controllable": controllable}
CONFIGS = {"dreambooth": dreambooth.DreamBoothConfig, "controllable": controllable.ControllableConfig}
PAPERS = {
    "dreambooth": ["ether", "ether_plus", "lora", "oft", "naive", "full"],
    "controllable": ["ether", "ether_plus_both", "lora", "oft", "naive", "encoder_only", "controlnet"],
}
METHOD_OF = {"ether_plus_both": "ether_plus", "encoder_only": "none"}
SHIPPED = [(task, name) for task in PAPERS for name in [*PAPERS[task], *(["ether_plus"] * (task == "controllable"))]]


@pytest.mark.parametrize(("task", "name"), SHIPPED)
def test_a_swapped_method_is_the_one_of_its_own_config(task: str, name: str) -> None:
    """With its settings, rates and layers: no setting of the file's own method stays."""
    for other in PAPERS[task]:
        method = METHOD_OF.get(other, other)
        if method == METHOD_OF.get(name, name):
            continue
        own = TASKS[task].resolve(load_config(CONFIGS[task], f"{task}/{other}"))
        swapped = TASKS[task].resolve(load_config(CONFIGS[task], f"{task}/{name}", [f"adapter.method={method}"]))
        own = own.model_copy(update={"output_dir": swapped.output_dir})
        if other == "lora":  # whose configs state the start of the paper's code
            own = own.model_copy(update={"adapter": own.adapter.model_copy(update={"init_lora_weights": "kaiming"})})
        if {"full", "controlnet"} & {name, other}:  # those configs also limit the disk space of checkpoints
            for rate in [name for name in type(own.training).model_fields if "learning_rate" in name]:
                assert getattr(swapped.training, rate) == getattr(own.training, rate), (other, rate)
            swapped = swapped.model_copy(update={"training": own.training})
        assert swapped == own, other


@pytest.mark.parametrize("method", ["boft", "hra", "vera", "dora", "delora"])
@pytest.mark.parametrize(("task", "name"), [("dreambooth", "lora"), ("controllable", "ether_plus")])
def test_methods_without_a_config_come_with_their_own_defaults(task: str, name: str, method: str) -> None:
    swapped = TASKS[task].resolve(load_config(CONFIGS[task], f"{task}/{name}", [f"adapter.method={method}"]))
    plain = type(swapped.adapter)(target=swapped.adapter.target)
    assert swapped.adapter == plain
    assert swapped.training.learning_rate == plain.learning_rates[task]


def test_what_is_given_with_the_method_is_kept_in_any_order() -> None:
    for overrides in (["adapter.method=oft", "adapter.num_blocks=8"], ["adapter.num_blocks=8", "adapter.method=oft"]):
        config = load_config(dreambooth.DreamBoothConfig, "dreambooth/ether_plus", overrides)
        assert (config.adapter.method, config.adapter.num_blocks) == ("oft", 8)  # pyright: ignore[reportAttributeAccessIssue]
    merged = load_config(dreambooth.DreamBoothConfig, "dreambooth/ether_plus", ["adapter={method: lora, rank: 8}"])
    assert (merged.adapter.method, merged.adapter.rank) == ("lora", 8)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_same_method_leaves_the_file_as_it_is() -> None:
    plain = load_config(controllable.ControllableConfig, "controllable/ether_plus")
    again = load_config(controllable.ControllableConfig, "controllable/ether_plus", ["adapter.method=ether_plus"])
    assert again == plain
    assert plain.adapter.sides_pattern  # pyright: ignore[reportAttributeAccessIssue]


def test_settings_given_for_another_method_are_still_faults() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.sides"):
        load_config(dreambooth.DreamBoothConfig, "dreambooth/ether_plus", ["adapter.method=lora", "adapter.sides=in"])


@pytest.mark.parametrize(("task", "name"), [("dreambooth", "ether_plus"), ("controllable", "ether_plus")])
def test_prodigy_finds_its_rate_with_any_shipped_config(task: str, name: str) -> None:
    config = load_config(CONFIGS[task], f"{task}/{name}", ["training.optimizer=prodigy"])
    assert TASKS[task].resolve(config).training.learning_rate == 1.0


def test_a_rate_of_another_optimiser_is_refused_with_prodigy() -> None:
    overrides = ["training.optimizer=prodigy", "training.learning_rate=0.006"]
    with pytest.raises(ConfigError, match=r"0\.006, but prodigy finds its rate"):
        load_config(dreambooth.DreamBoothConfig, "dreambooth/ether_plus", overrides)
