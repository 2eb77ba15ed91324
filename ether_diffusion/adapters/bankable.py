"""What a bank or a shelf takes of a saved adapter: its vectors, if they are all that it is."""

from __future__ import annotations

from torch import Tensor

from ether_diffusion.errors import UserError
from ether_diffusion.ether import EtherConfig
from ether_diffusion.ether.bank import Layout

from .saved_adapter import PREFIX, SavedAdapter

CONDITION_ENCODER = "condition_encoder"
"""The folder next to an adapter whose run is controllable."""


def bankable(adapter: SavedAdapter) -> tuple[dict[str, Tensor], Layout]:
    """The vectors of an adapter by name, and their layout.

    Raises:
        UserError: it is of another method, or has parts that a bank does not hold.
    """
    where = adapter.folder
    if not isinstance(adapter.config, EtherConfig):
        raise UserError(f"{where} is {adapter.method}; a bank is for ETHER and ETHER+.")
    if adapter.text_encoders:
        raise UserError(
            f"{where} also trained its text encoder (adapter.text_encoder=true), which a bank of UNet adapters would "
            "leave out. Load it with load_adapter."
        )
    if adapter.before is not None:
        raise UserError(f"{where} was trained after another adapter; a bank has the plain base. Use load_adapter.")
    if getattr(adapter.config, "modules_to_save", None):
        raise UserError(f"{where} holds whole modules (modules_to_save); a bank holds vectors alone. Use load_adapter.")
    if (where.parent / CONDITION_ENCODER).is_dir():
        raise UserError(
            f"{where} belongs to a controllable run, which needs the condition encoder it was trained with. Generate "
            "with load_pipeline or generate."
        )
    vectors = {key.removeprefix(PREFIX): tensor for key, tensor in adapter.tensors.items()}
    try:
        return vectors, Layout.of({key: tuple(tensor.shape) for key, tensor in vectors.items()})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
