"""EtherConfig: what it accepts, what it fills in, how it is saved; and its registration with PEFT."""

from __future__ import annotations

import enum
from typing import Any

import peft
import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ether_diffusion import EtherConfig, EtherModel
from ether_diffusion.ether import EtherPeftType, register


def test_sides_default_to_the_papers():
    assert EtherConfig(variant="ether").sides == "in"
    assert EtherConfig(variant="ether_plus").sides == "both"
    assert EtherConfig(variant="ether_plus", sides="in").sides == "in"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "ether++"}, "variant is 'ether\\+\\+'; allowed: 'ether', 'ether_plus'"),
        ({"sides": "out"}, "sides is 'out'; allowed: 'in', 'both'"),
        ({"num_blocks": 0}, "num_blocks is 0; allowed: whole numbers from 1"),
        ({"num_blocks": 2.0}, "num_blocks is 2.0"),
        ({"num_blocks": True}, "num_blocks is True"),
        ({"sides_pattern": {"to_q": "left"}}, r"sides_pattern\['to_q'\] is 'left'"),
        ({"blocks_pattern": {"to_q": -1}}, r"blocks_pattern\['to_q'\] is -1"),
    ],
)
def test_wrong_values_are_named_with_the_allowed_ones(settings, message):
    with pytest.raises(ValueError, match=message):
        EtherConfig(**settings)


def test_saved_config_is_read_back_by_peft_as_ours(tmp_path):
    config = EtherConfig(
        variant="ether", num_blocks=4, target_modules=["a", "b"], sides_pattern={"a": "both"}, blocks_pattern={"b": 2}
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, EtherConfig)
    assert loaded.to_dict() == {**config.to_dict(), "inference_mode": loaded.inference_mode}


ETHER: Any = EtherPeftType.ETHER


def test_registering_again_changes_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING
    assert PEFT_TYPE_TO_CONFIG_MAPPING[ETHER] is EtherConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[ETHER] is EtherModel


def test_a_method_of_that_name_in_peft_is_not_shadowed(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, ETHER, PeftConfig)
    with pytest.raises(RuntimeError, match="already has a method named ETHER"):
        register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[ETHER] is PeftConfig


def test_a_member_of_that_name_in_pefts_enumeration_is_not_shadowed(monkeypatch):
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, ETHER)
    monkeypatch.setattr(peft, "PeftType", enum.Enum("PeftType", {"LORA": "LORA", "ETHER": "ETHER"}))
    with pytest.raises(RuntimeError, match="will not shadow"):
        register()
    assert ETHER not in PEFT_TYPE_TO_CONFIG_MAPPING
