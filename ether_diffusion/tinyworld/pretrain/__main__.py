"""The command that trains the miniature's weights: stage by stage, each resumable, and exports them as shipped."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.quiet import quiet_dependencies
from ether_diffusion.tinyworld.figures import measure
from ether_diffusion.tinyworld.phrasing import VOCABULARY
from ether_diffusion.tinyworld.scenes import sample_scene, sample_view
from ether_diffusion.tinyworld.tokenizer import build_tokenizer

from .autoencoder import autoencoder_stage, standardise
from .card import write_card
from .denoiser import assemble, denoiser_stage, encode_all
from .export import export
from .networks import NETWORKS, random_network, shipped_weights
from .rendered import FRESH, Pictures
from .scorer_stages import backbone_stage, clip_stage, segmenter_stage
from .stage import Stage, steps_taken, train

STAGES = {"autoencoder": 3200, "clip": 800, "denoiser": 32_000, "backbone": 2000, "segmenter": 2800}
SCENES, VIEWS, UNSEEN = 40960, 16384, 2048


class Making:
    """All networks and pictures of one run of the command; stages that others need are trained first."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, self.device, self.compiled = Path(arguments.to), arguments.device, arguments.compile
        self.steps = {name: max(1, round(steps * arguments.scale)) for name, steps in STAGES.items()}
        scenes, views, unseen = (max(128, round(n * min(1, arguments.scale))) for n in (SCENES, VIEWS, UNSEEN))
        pictures = partial(Pictures, device=self.device)
        self.scenes = pictures(self.folder / "pictures/scenes", scenes, scene_of=sample_scene)
        self.fresh = pictures(self.folder / "pictures/unseen", unseen, scene_of=sample_scene, first=FRESH)
        self.views = partial(pictures, self.folder / "pictures/views", views, scene_of=sample_view)
        unseen_views = self.folder / "pictures/unseen-views"
        self.fresh_views = partial(pictures, unseen_views, unseen // 2, scene_of=sample_view, first=FRESH)
        torch.manual_seed(0)
        self.tokenizer = build_tokenizer(VOCABULARY)
        self.networks = {name: random_network(name).to(self.device) for name in NETWORKS}
        self.shipped = shipped_weights() if arguments.start == "shipped" else {}

    def run(self, name: str) -> Any:
        """Train one stage to its end; returns its network with the averaged weights."""
        network = self.networks[name]
        network.load_state_dict(train(self._stage(name), self.folder, start_from=self.shipped.get(name)))
        return network.eval().requires_grad_(False)

    def needed(self, name: str) -> Any:
        """A network for another stage: the shipped one if the run starts from it and has not trained its own."""
        if name not in self.shipped or (self.folder / f"{name}.safetensors").exists():
            return self.run(name)
        network = self.networks[name]
        network.load_state_dict(self.shipped[name])
        return network.eval().requires_grad_(False)

    def with_shipped(self, only: str) -> dict[str, Any]:
        """All networks by stage after `only` is trained: of the others those trained to their end, else the shipped.

        The UNet is left out if its autoencoder or text tower was trained further without it: they no longer fit.
        """
        taken = {name: steps_taken(self.folder / f"{name}.safetensors") for name in STAGES}
        fits = only == "denoiser" or not (taken["autoencoder"] or taken["clip"])
        ready = {only, "autoencoder", "clip"} if only == "denoiser" else {only}
        for name in STAGES:
            if name not in ready and (fits or name != "denoiser"):
                if taken[name] >= self.steps[name]:
                    self.run(name)
                else:
                    self.networks[name].load_state_dict(self.shipped[name])
        return {name: network.eval() for name, network in self.networks.items() if fits or name != "denoiser"}

    def record(self, trained: list[str], networks: dict[str, Any]) -> dict[str, Any]:
        """The steps of these stages and the number of parameters of each network, for `making.json`."""
        parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
        return {"steps": {name: self.steps[name] for name in trained}, "parameters": parameters}

    def _stage(self, name: str) -> Stage:
        network, data = self.networks[name], (self.scenes, self.fresh, self.steps[name])
        if name == "autoencoder":
            return autoencoder_stage(network, *data)
        if name == "clip":
            return clip_stage(network, self.tokenizer, *data)
        if name == "backbone":
            return backbone_stage(network, self.views(), self.fresh_views(), self.steps[name])
        if name == "segmenter":
            return segmenter_stage(network, *data)
        vae, clip = self.needed("autoencoder"), self.needed("clip")
        standardise(vae, self.scenes)
        pipeline = assemble(vae, clip.text_model, self.tokenizer, network)
        return denoiser_stage(pipeline, encode_all(vae, self.scenes, self.folder), *data, compiled=self.compiled)


def main() -> None:
    """`python -m ether_diffusion.tinyworld.pretrain --help`"""
    parser = argparse.ArgumentParser(prog="python -m ether_diffusion.tinyworld.pretrain", description=__doc__)
    parser.add_argument("--to", default="runs/tinyworld", metavar="DIR", help="output folder; a second call resumes")
    parser.add_argument("--only", choices=STAGES, help="train only this stage, with those that it needs")
    parser.add_argument(
        "--scorers", "--judges", action="store_true", help="train the autoencoder and the scorers, without the UNet"
    )
    parser.add_argument("--from", dest="start", choices=("nothing", "shipped"), default="nothing")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="factor for steps and pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of this process")
    parser.add_argument("--compile", action="store_true", help="compile the UNet's steps (needs a C++ compiler)")
    arguments = parser.parse_args()
    quiet_dependencies()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    making = Making(arguments)
    if arguments.only:
        making.run(arguments.only)
        if arguments.start == "shipped":
            networks = making.with_shipped(arguments.only)
            record = making.record([arguments.only], networks) | {
                "note": "These steps continue from the shipped weights."
            }
            print(f"Weights: {export(networks, making.tokenizer, making.folder / 'weights', record)}")
        return
    stages = [name for name in STAGES if not (arguments.scorers and name == "denoiser")]
    networks = {name: making.run(name) for name in stages}
    record = making.record(stages, networks)
    weights = export(networks, making.tokenizer, making.folder / "weights", record)
    print(f"Card: {write_card(weights, measure(weights), record)}")


if __name__ == "__main__":
    main()
