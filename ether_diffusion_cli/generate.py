"""`ether-diffusion generate`: images from a base and a saved adapter, by prompts or under conditions."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import (
    Commands,
    add_batch_size,
    add_device,
    add_dtype,
    add_parts,
    amount,
    positive,
    seed,
    share,
    strength,
)
from .generate_conditions import generate_under_conditions
from .generate_from_requests import generate_from_requests
from .generate_request import (
    CONDITION_FLAGS,
    check_numbers,
    check_prompts,
    default_output,
    load,
    print_images,
    print_prompt_notes,
    print_sheets,
    prompts_of,
    read_parts,
    refuse,
    sampling_of,
)

if TYPE_CHECKING:
    from ether_diffusion.generation import GeneratedImages, SavedRun
    from ether_diffusion.pictures import Row


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "generate",
        run,
        "generate images with a saved adapter",
        "Generate images with a saved adapter: PNGs with their settings inside, grid.png and images.jsonl. "
        "Complete files are kept on a rerun. No safety checker runs. A controllable run generates under conditions: of "
        "a data set (--dataset DIR --split validation), or your own (--condition FILE --prompt TEXT).",
    )
    add = parser.add_argument
    add_parts(
        parser,
        "a run folder, RUN/checkpoints/step-…, a PEFT folder, or USER/NAME of the hub (default: none, with "
        "--base-model), with its strength (default: 1); of several, and with --lora, the changes of the base's weights "
        "add up",
    )
    add(
        "--base-model",
        metavar="NAME",
        help="default: the base that the adapter was trained on; without --adapter: the base to generate with",
    )
    add("--vae", metavar="NAME", help="default: the VAE that the adapter was trained with")
    add("--allow-pickle", action="store_true", help="allow a .ckpt to run code of its own while it is read")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="one prompt")
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    prompts.add_argument(
        "--requests",
        metavar="FILE",
        help='JSON lines, each with its own adapter: {"adapter", "prompt", "seed", "num_images", "scale", '
        '"negative_prompt"}; ETHER and ETHER+ adapters share batches',
    )
    add("--shelf", metavar="FILE", help="the shelf with the adapters that --requests names (default: run folders)")
    add("--output", metavar="DIR", help="default: RUN/images/PROMPT; of a base alone, images/PROMPT")
    add("--num-images", type=positive, default=1, metavar="N", help="images per prompt (default: 1)")
    add(
        "--seed",
        type=seed,
        default=0,
        metavar="S",
        help="an image's noise is a function of S, its prompt or condition, and its number (default: 0)",
    )
    add(
        "--scheduler",
        choices=("dpm++", "ddim", "ddpm", "euler", "euler_a", "pndm", "unipc"),
        help="default: dpm++; ddim under conditions",
    )
    add("--steps", type=positive, metavar="N", help="sampling steps (default: 25; 50 under conditions)")
    add("--guidance", type=amount, metavar="G", help="guidance scale (default: 7.5; 9 under conditions)")
    add("--negative-prompt", metavar="TEXT", help="what to avoid in the image (default: the empty prompt)")
    add(
        "--resolution",
        type=positive,
        metavar="PIXELS",
        help="side of a square image, or the short side under a condition (default: the base's own)",
    )
    add("--scale", type=strength, default=1.0, metavar="X", help="factor of all strengths (default: 1)")
    add("--merge", action="store_true", help="merge the adapter into the base's weights first")
    add_batch_size(parser, 1)
    add_device(parser)
    add_dtype(parser)
    add(
        "--quantization",
        choices=("bitsandbytes_4bit", "bitsandbytes_8bit", "torchao_int8"),
        help="hold the UNet's linear layers in four or eight bits (default: no)",
    )
    add(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="move idle parts to CPU memory: whole models, or layers, which is slow (default: none)",
    )
    add("--compare", action="store_true", help="generate with the base alone, too: contact_sheet.png shows both")
    _add_condition_options(parser)


def _add_condition_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("under conditions", "What the images of a controllable run follow.")
    add = group.add_argument
    add("--dataset", metavar="DIR", help="the conditions and captions of a data set, or builtin:scenes")
    add("--split", metavar="NAME", help="of the data set (default: validation)")
    add("--captions", metavar="PATH", help="JSON lines or text files (default: those of the data set)")
    add("--caption-template", metavar="TEXT", help='for pairs without a caption: "a photo of a {scene}"')
    add("--limit", type=positive, metavar="N", help="only the first N pairs, by name (default: all)")
    add("--condition", metavar="PATH", help="a label map, a painted map or a photo, or a folder of them; with --prompt")
    add(
        "--preprocessor",
        metavar="NAME",
        help="makes conditions of photos: canny, hed, …; none: the files are conditions (default: as in training)",
    )
    add("--height", type=positive, metavar="PIXELS", help="default: in the condition's proportions")
    add("--width", type=positive, metavar="PIXELS", help="default: in the condition's proportions")
    add("--condition-scale", type=amount, metavar="X", help="strength of the condition (default: 1)")
    add(
        "--condition-start",
        type=share,
        metavar="X",
        help="share of the steps after which the condition is applied (default: 0)",
    )
    add(
        "--condition-end",
        type=share,
        metavar="X",
        help="share of the steps after which the condition is no longer applied (default: 1)",
    )


def run(arguments: Namespace) -> None:
    """Generate the images.

    Raises:
        UserError: arguments that exclude each other, or what the parts that they name raise.
    """
    from ether_diffusion.errors import UserError

    check_numbers(arguments)
    if arguments.requests is not None:
        generate_from_requests(arguments)
        return
    refuse(arguments, "{} needs --requests FILE.", "shelf")
    saved = read_parts(arguments)
    if saved is None and arguments.base_model is None:
        raise UserError("generate: give --adapter RUN, or --base-model NAME to generate with a base alone.")
    arguments.output = arguments.output or default_output(arguments, saved)
    if saved is not None and saved.condition_encoder is not None:
        generate_under_conditions(arguments, saved, saved.condition_encoder)
    else:
        _generate_from_prompts(arguments, saved)


def _generate_from_prompts(arguments: Namespace, saved: SavedRun | None) -> None:
    from ether_diffusion.errors import UserError
    from ether_diffusion.generation import Sampling, generate
    from ether_diffusion.models.families.table import family_of
    from ether_diffusion.own_files import check_own
    from ether_diffusion.pictures import save_sheets

    what = f"{saved.path} holds no condition_encoder/" if saved else "a base alone takes no conditions"
    refuse(arguments, f"{{}} needs a controllable run; {what}.", *CONDITION_FLAGS)
    prompts = prompts_of(arguments)
    if prompts is None:
        raise UserError("generate: give --prompt TEXT, or --prompts FILE.")
    check_prompts(prompts, arguments)
    sampling, output = sampling_of(Sampling, arguments), Path(arguments.output)

    def generated(folder: Path, with_adapter: bool = True) -> GeneratedImages:
        pipeline, record = load(arguments, saved, with_adapter=with_adapter)
        if with_adapter:
            print_prompt_notes(pipeline, record["base_model"], prompts, sampling.negative_prompt, saved)
        return generate(
            pipeline,
            prompts,
            folder,
            images_per_prompt=arguments.num_images,
            seed=arguments.seed,
            sampling=sampling_of(Sampling, arguments, family_of(pipeline).sampling),
            resolution=arguments.resolution,
            batch_size=arguments.batch_size,
            record=record,
        )

    check_own(*[output / "contact_sheet.png"] * arguments.compare)
    after = generated(output)
    print_images(after, output)
    if arguments.compare and saved is not None:
        before = generated(output / "before", with_adapter=False)
        rows = [("before: the base alone", before.files), ("after: with the adapter", after.files)]
        photos = [row for run in saved.runs for row in _photo_row(run)]
        print_sheets(save_sheets([*photos, *rows], output / "contact_sheet.png", own=True))


def _photo_row(saved: SavedRun) -> list[Row]:
    """The photos that the adapter was trained on, if its run folder names them and they are still there."""
    from ether_diffusion.data.photos import find_photos
    from ether_diffusion.errors import UserError

    data = saved.config.get("data") or {}
    if not data.get("instance_dir"):
        return []
    try:
        photos = find_photos(data["instance_dir"])
    except UserError:
        return []
    title = f'the photos: {photos.folder}, "{data.get("instance_prompt")}"'
    return [(title, [photo.open() for photo in photos.photos])]
