"""Class images for prior preservation: drawn by the base model into a cache, with a manifest of how."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ether_diffusion.config import Settings
from ether_diffusion.data.caches import cache_folder
from ether_diffusion.data.photos import PhotoFolder, find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.generation import Job, Sampling, fault, sample_images
from ether_diffusion.models.bases import Base, fingerprint
from ether_diffusion.pictures import read_settings, save_png
from ether_diffusion.progress import progress_bar

MANIFEST = "manifest.json"


class ClassImages(Settings):
    """What class images depend on."""

    base_model: str
    prompt: str
    num_images: int
    resolution: int
    seed: int
    sampling: Sampling


def class_images(wanted: ClassImages, base: Base, cache: Path | None, accelerator: Accelerator) -> PhotoFolder:
    """The class images of these settings: those in the cache that match the manifest, and the rest drawn by `base`.

    `base` must not carry an adapter yet. The number of images is no part of the match: where more are wanted, more are
    drawn into the same folder.

    Raises:
        UserError: the folder of these settings says that it was made in another way.
    """
    manifest = _manifest(wanted, base)
    key = hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = (cache or cache_folder("class_images")) / key
    _generate_missing(wanted, base, folder, manifest, accelerator)
    accelerator.wait_for_everyone()
    found = find_photos(folder)
    names = {f"{k:05d}.png" for k in range(wanted.num_images)}
    return PhotoFolder(found.folder, tuple(photo for photo in found.photos if photo.name in names), ())


def _manifest(wanted: ClassImages, base: Base) -> dict[str, Any]:
    parts = {"unet": base.unet, "vae": base.vae, "text_encoder": base.text_encoder}
    prints = {name: fingerprint(part) for name, part in parts.items()}
    return {**wanted.model_dump(mode="json", exclude={"num_images"}), "fingerprints": prints}


def _generate_missing(
    wanted: ClassImages, base: Base, folder: Path, manifest: dict[str, Any], accelerator: Accelerator
) -> None:
    """Every process draws its share; complete files of an interrupted run are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if accelerator.is_main_process and not path.exists():
        write_whole(path, json.dumps(manifest, indent=1, sort_keys=True))
    jobs = [Job(wanted.prompt, k, f"{k:05d}.png") for k in range(wanted.num_images)]
    missing = [job for job in jobs if read_settings(folder / job.file) is None]
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != manifest:
        raise UserError(f"{path} is not the manifest of what should lie in {folder}. Delete that folder to draw anew.")
    accelerator.wait_for_everyone()
    share = missing[accelerator.process_index :: accelerator.num_processes]
    if not share:
        return
    accelerator.print(f'Drawing {len(missing)} class images of "{wanted.prompt}" into {folder}')
    with progress_bar(len(share), "class images", "image", shown=accelerator.is_main_process) as bar:
        drawn = sample_images(
            base.pipeline().to(accelerator.device),
            share,
            wanted.sampling,
            seed=wanted.seed,
            resolution=wanted.resolution,
            batch_size=4 if accelerator.device.type == "cuda" else 1,
            progress=bar.update,
        )
        bad = 0
        for job, image in drawn:
            save_png(image, folder / job.file, {"prompt": job.prompt, "k": job.k})
            bad += fault(image) is not None
    if bad:
        print(f"{bad} of the {len(share)} class images in {folder} are black or NaN.")
