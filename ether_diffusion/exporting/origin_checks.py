"""What an export refuses before it writes: weights that are marked as not certified, and another base than theirs."""

from __future__ import annotations

from ether_diffusion.adapters.base_digest import base_digest
from ether_diffusion.adapters.certificate import CERTIFICATE, Certificate, read_certificate
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.errors import UserError
from ether_diffusion.generation import SavedRun
from ether_diffusion.input_files import read_bytes
from ether_diffusion.models.bases import Base


def certificate_of(run: SavedRun) -> Certificate | None:
    """What was checked when a run's weights were saved; None: another program saved them, or an earlier version."""
    if isinstance(run.adapter, SavedAdapter):
        return run.adapter.certificate
    folder = run.adapter.folder if run.adapter is not None else run.condition_encoder
    path = folder / CERTIFICATE if folder is not None else None
    return read_certificate(read_bytes(path)) if path is not None and path.is_file() else None


def check_certified(run: SavedRun) -> None:
    """Refuse weights that failed their certificate. Raises UserError."""
    certificate = certificate_of(run)
    if certificate is not None and certificate.faults:
        raise UserError(f"{run.path} is not certified: {certificate.line}. Take it all the same: --uncertified")


def same_base(saved: SavedAdapter, base: Base) -> bool | None:
    """Whether the weights of a base are those that an adapter was trained on; None: one of them is not known."""
    recorded = saved.certificate.base if saved.certificate is not None else {}
    found = []
    texts = [(f"{name}_", encoder) for name, encoder in base.trainable_text_encoders.items()]
    for prefix, part in [("", base.denoiser), *texts]:
        theirs, dtype = recorded.get(f"{prefix}digest"), recorded.get(f"{prefix}dtype")
        ours = base_digest(part, dtype) if theirs is not None else None
        if ours is not None:
            found.append(ours == theirs)
    return all(found) if found else None


def check_same_base(saved: SavedAdapter, base: Base) -> None:
    """Refuse another base than the one that an adapter was trained on. Raises UserError."""
    if same_base(saved, base) is False:
        raise UserError(
            f"--base {base.name} has other weights than {saved.base_model}, on which {saved.folder} was trained: the "
            "exported change would be another one. To export it all the same: --force-base"
        )
