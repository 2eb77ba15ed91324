"""Check everything that needs a real base and real photos, and print one Markdown table to send in.

    python benchmarks/real_base_check.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 --photos photos/my_dog \
        --class-name dog [--steps 200] [--output runs/real_base_check]

Counts of keys and parameters against the published architecture; at strength 0, and with a fresh ETHER+ adapter, images
equal to plain diffusers' bit for bit; a training of 200 steps on the photos, with time and memory; scores of images
before and after it (DINO, CLIP-I and CLIP-T, where their weights are here); the kohya export loaded back by plain
diffusers, against our image. A part that fails is a row that says so, and the others run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

Row = tuple[str, str]
GIB = 2**30
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 1e-1}
"""How far an image with the exported file may be from ours, of the image's range. In half precision both round."""


def main() -> int:
    """Run all parts. Returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, metavar="NAME|DIR", help="a hub name, or a folder in diffusers' layout")
    add("--photos", required=True, type=Path, metavar="DIR", help="3 to 6 photos of one subject")
    add("--class-name", default="dog", metavar="WORD", help="its category (default: %(default)s)")
    add("--steps", type=int, default=200, help="of training (default: %(default)s)")
    add("--sampling-steps", type=int, default=25, help="of each image (default: %(default)s)")
    add("--images", type=int, default=4, help="before and after training, to score (default: %(default)s)")
    add("--resolution", type=int, default=512, help="of photos and images (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=tuple(TOLERANCE), default="fp32", help="of the images (default: %(default)s)")
    add("--precision", choices=("no", "fp16", "bf16"), help="of the training (default: bf16 on CUDA, else no)")
    add("--protocol", default="dreambooth/subject-macro-v1", help="whose scorers score (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/real_base_check"), help="a new folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists; name a new folder.")
    from ether_diffusion.quiet import quiet_dependencies

    quiet_dependencies()
    arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "no")
    began, rows, failed = time.perf_counter(), list[Row](), False
    for part in (machine, counts, strength_zero, training, scores, kohya):
        start = time.perf_counter()
        title = (part.__doc__ or part.__name__).splitlines()[0].rstrip(".")
        try:
            for row in part(arguments):
                rows.append(row)
                print(f"{row[0]}: {row[1]}", flush=True)
        except Exception as error:
            failed = True
            reason = " ".join(str(error).split())[:200] or "no message"
            rows.append((title, f"FAILED: {type(error).__name__}: {reason}"))
            print(rows[-1], flush=True)
        rows.append((f"{title}: seconds", f"{time.perf_counter() - start:.0f}"))
        release()
    command = " ".join(["python", "benchmarks/real_base_check.py", *sys.argv[1:]])
    print(f"\n`{command}`, {time.perf_counter() - began:.0f} s\n\n| check | result |\n|---|---|")
    for name, result in rows:
        print(f"| {name} | {result.replace('|', chr(92) + '|')} |")
    return int(failed)


def machine(arguments: argparse.Namespace) -> Iterator[Row]:
    """Machine."""
    import diffusers
    import peft
    import transformers

    from ether_diffusion import __version__

    here = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.processor() or 'CPU'}"
    yield "device", f"{here}, {torch.get_num_threads()} threads, images in {arguments.dtype}"
    found = {"ether_diffusion": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    found |= {"transformers": transformers.__version__, "peft": peft.__version__}
    yield "versions", ", ".join(f"{name} {version}" for name, version in found.items())


def counts(arguments: argparse.Namespace) -> Iterator[Row]:
    """Keys and parameters of the base."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from ether_diffusion.models.bases import fingerprint, load_base
    from ether_diffusion.models.families import stable_diffusion_v1 as sd

    with torch.device("meta"):
        published = {
            "unet": sd.build_unet(),
            "vae": AutoencoderKL(**sd.VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**sd.TEXT_ENCODER)),
        }
    base = load_base(arguments.base)
    for part, expected in published.items():
        module = getattr(base, part)
        keys, numbers = len(module.state_dict()), sum(p.numel() for p in module.parameters())
        wanted = len(expected.state_dict()), sum(p.numel() for p in expected.parameters())
        if (keys, numbers) != wanted:
            raise RuntimeError(f"{part}: {keys} keys, {numbers:,} parameters; v1.5 has {wanted[0]} and {wanted[1]:,}")
        yield part, f"{keys} keys, {numbers:,} parameters, as Stable Diffusion v1.5"
    yield "base", f"{base.name}, digest of its UNet {fingerprint(base.unet)}"


def strength_zero(arguments: argparse.Namespace) -> Iterator[Row]:
    """Strength 0 against plain diffusers."""
    from ether_diffusion.adapters.attach import attach, set_scale, trainable_parameters
    from ether_diffusion.adapters.methods import METHODS
    from ether_diffusion.models.bases import load_base

    pipeline = plain_pipeline(arguments)
    expected = image(pipeline, arguments, "a photo of a house")
    del pipeline
    release()
    base = load_base(arguments.base, DTYPES[arguments.dtype])
    settings = METHODS["ether_plus"]()
    layers = attach(base.unet, settings)
    parameters = trainable_parameters(base.unet)
    number = sum(parameter.numel() for parameter in parameters.values())
    yield "adapter", f"ETHER+ in {len(layers)} layers, {number:,} parameters"
    ours: Any = base.pipeline().to(arguments.device)
    fresh = image(ours, arguments, "a photo of a house")
    yield compared("fresh ETHER+, strength 1", fresh, expected)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    moved = image(ours, arguments, "a photo of a house")
    yield "moved adapter, strength 1", f"differs by {float((moved - expected).abs().max()):.2g}, as it must"
    set_scale(base.unet, 0)
    yield compared("moved adapter, strength 0", image(ours, arguments, "a photo of a house"), expected)


def training(arguments: argparse.Namespace) -> Iterator[Row]:
    """Training on the photos."""
    settings = [
        f"base_model={arguments.base}",
        f"data.instance_dir={arguments.photos}",
        f"data.class_name={arguments.class_name}",
        f"data.resolution={arguments.resolution}",
        "data.prior=null",
        f"training.steps={arguments.steps}",
        f"training.mixed_precision='{arguments.precision}'",  # YAML takes a bare no for false
        "training.tracker=none",
        "validation.prompts=[]",
        f"output_dir={arguments.output / 'run'}",
    ]
    command = ["train", "dreambooth", "--config", "dreambooth/ether_plus", *settings]
    done = subprocess.run([sys.executable, "-m", "ether_diffusion_cli", *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    pace = re.search(r"\((.* s a step, peak memory .*)\)", done.stdout)
    yield f"{arguments.steps} steps, {arguments.precision}", pace[1] if pace else "no time was printed"
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB
    yield "largest process of the training", f"{peak:.2f} GiB of memory"
    losses = [float(found) for found in re.findall(r'"loss": ([\d.e+-]+)', metrics(arguments))]
    first, last = losses[: max(1, len(losses) // 10)], losses[-max(1, len(losses) // 10) :]
    yield "loss, first and last tenth", f"{sum(first) / len(first):.4f}, {sum(last) / len(last):.4f}"


def scores(arguments: argparse.Namespace) -> Iterator[Row]:
    """Scores before and after training."""
    from ether_diffusion.data.photos import find_photos
    from ether_diffusion.evaluation.protocols import load_any_protocol
    from ether_diffusion.evaluation.scorers import load_scorers
    from ether_diffusion.metrics.pairwise import cosines

    folders = {name: arguments.output / name for name in ("before", "after")}
    prompt = f"a qwe {arguments.class_name} in the jungle"
    for name, folder in folders.items():
        options = ["--prompt", prompt, "--num-images", str(arguments.images), "--steps", str(arguments.sampling_steps)]
        options += ["--resolution", str(arguments.resolution), "--dtype", arguments.dtype, "--output", str(folder)]
        what = ["--base-model", arguments.base] if name == "before" else ["--adapter", str(arguments.output / "run")]
        run("generate", *what, *options, "--device", arguments.device)
    yield "images", f"{arguments.images} before and after, {prompt!r}, in {arguments.output}"
    from PIL import Image

    photos = [photo.open() for photo in find_photos(arguments.photos).photos]
    images = {name: [Image.open(path) for path in sorted(folder.glob("0*.png"))] for name, folder in folders.items()}
    protocol: Any = load_any_protocol(arguments.protocol)
    for name, scorer in protocol.judges.items():
        try:
            network = load_scorers({name: scorer}, device=arguments.device)[name].network
        except ValueError as error:
            yield name, f"not scored: {' '.join(str(error).split())[:160]}"
            continue
        if not hasattr(network, "image_features"):
            continue
        real = network.image_features(photos)
        similarity = {k: float(cosines(network.image_features(each), real).mean()) for k, each in images.items()}
        yield f"{name}, similarity to the photos", "{before:.3f} before, {after:.3f} after".format(**similarity)
        if hasattr(network, "text_features"):
            text = network.text_features([prompt.replace("qwe ", "")])
            fit = {k: float(cosines(network.image_features(each), text).mean()) for k, each in images.items()}
            yield f"{name}, similarity to the prompt", "{before:.3f} before, {after:.3f} after".format(**fit)


def kohya(arguments: argparse.Namespace) -> Iterator[Row]:
    """The kohya export, in plain diffusers."""
    from ether_diffusion import export
    from ether_diffusion.generation import load_pipeline

    prompt = f"a qwe {arguments.class_name}"
    file = arguments.output / "adapter.safetensors"
    done = export(arguments.output / "run", "kohya", file, dtype="fp32", base_model=arguments.base)
    size = f"{file.stat().st_size:,} bytes"
    yield "export", f"{done.layers} layers of ranks {done.ranks}, {size}, read back {done.error:.1e} off"
    release()
    ours, _ = load_pipeline(arguments.output / "run", device=arguments.device, dtype=arguments.dtype)
    expected = image(ours, arguments, prompt)
    del ours
    release()
    theirs = plain_pipeline(arguments)
    before = image(theirs, arguments, prompt)
    theirs.load_lora_weights(str(file))
    found = image(theirs, arguments, prompt)
    spread = float(expected.max() - expected.min())
    off, effect = (float((one - expected).abs().max()) / spread for one in (found, before))
    allowed = TOLERANCE[arguments.dtype]
    yield "image by load_lora_weights against ours", f"{off:.1e} of the range off (allowed {allowed:.0e})"
    yield "what the adapter changes in that image", f"{effect:.1e} of the range"
    if not off <= allowed:
        raise RuntimeError(f"off by {off:.1e}")


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def plain_pipeline(arguments: argparse.Namespace) -> Any:
    """The base as plain diffusers loads it, with the scheduler that our pipelines have."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    options: Any = {"safety_checker": None, "requires_safety_checker": False, "dtype": DTYPES[arguments.dtype]}
    pipeline: Any = StableDiffusionPipeline.from_pretrained(arguments.base, **options).to(arguments.device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline


@torch.no_grad()
def image(pipeline: Any, arguments: argparse.Namespace, prompt: str) -> torch.Tensor:
    """An image with the same noise each time: (H, W, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    side = arguments.resolution
    options = {"num_inference_steps": arguments.sampling_steps, "height": side, "width": side, "output_type": "np"}
    return torch.from_numpy(pipeline(prompt, generator=torch.Generator().manual_seed(5), **options).images[0]).float()


def compared(name: str, found: torch.Tensor, expected: torch.Tensor) -> Row:
    """A row that says whether two images are equal bit for bit. Raises RuntimeError if not."""
    if not torch.equal(found, expected):
        raise RuntimeError(f"{name}: differs from plain diffusers by {float((found - expected).abs().max()):.1e}")
    return name, "plain diffusers' image, bit for bit"


def run(*words: str) -> None:
    """A command of the package, in a process of its own. Raises RuntimeError with its error."""
    done = subprocess.run([sys.executable, "-m", "ether_diffusion_cli", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])


def metrics(arguments: argparse.Namespace) -> str:
    return (arguments.output / "run/metrics.jsonl").read_text(encoding="utf-8")


def release() -> None:
    """Free what the last part held."""
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
