"""The base's digest: attaching an adapter does not change it, merging one does."""

from __future__ import annotations

import torch
from peft import LoraConfig

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.attach import inject, merge
from ether_diffusion.evaluation.image_records import base_digest
from ether_diffusion.models.bases import load_base

TARGETS = ["to_q", "to_out.0"]


def test_the_digest_ignores_attached_adapters() -> None:
    bare = base_digest(load_base("tiny").pipeline())
    for config in (EtherConfig(target_modules=TARGETS), LoraConfig(target_modules=TARGETS)):
        pipeline = load_base("tiny").pipeline()
        inject(pipeline.unet, config, "default")
        assert base_digest(pipeline) == bare
        for name, parameter in pipeline.unet.named_parameters():
            if "default" in name:
                torch.nn.init.normal_(parameter)
        assert base_digest(pipeline) == bare
        merge(pipeline.unet)
        assert base_digest(pipeline) != bare
