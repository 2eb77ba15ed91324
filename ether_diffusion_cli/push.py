"""`ether-diffusion push`: a run's adapter on the Hugging Face hub, with a card, sample images and a LoRA file."""

from __future__ import annotations

from argparse import Namespace

from .arguments import Commands, add_run


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "push",
        run,
        "publish an adapter on the Hugging Face hub",
        "Publish an adapter on the hub: its files, a model card, sample images, and the same adapter as a LoRA for "
        "other programs. Needs a token: HF_TOKEN, or `hf auth login`.",
    )
    add_run(parser, "a run folder, a checkpoint folder, or a PEFT folder")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--license", metavar="ID", help="the hub's name of a licence (default: the base's, if known)")
    parser.add_argument("--output", metavar="DIR", help="the folder that is published (default: RUN/hub)")
    parser.add_argument("--base", metavar="NAME|DIR|FILE", help="default: the base that the run was trained on")
    parser.add_argument("--uncertified", action="store_true", help="publish weights that failed their certificate")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, and push nothing")


def run(arguments: Namespace) -> None:
    """Push the run, and print where it is.

    Raises:
        UserError: as `push`.
    """
    from ether_diffusion.exporting.hub_folder import push

    lines = push(
        arguments.adapter,
        arguments.repo,
        arguments.output,
        license=arguments.license,
        base_model=arguments.base,
        uncertified=arguments.uncertified,
        private=arguments.private,
        dry_run=arguments.dry_run,
    )
    print("\n".join(lines))
