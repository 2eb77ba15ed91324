"""The Hugging Face hub: adapters by name from it, folders of files to it, and its errors as one line each.

The client is huggingface_hub, and with it its settings: HF_TOKEN or `hf auth login`, HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

MARK = "ether_diffusion"
"""The tag by which a repository shows that this program filled it."""

_READ = ("*.json", "*.safetensors", "config.yaml")
"""What is fetched of an adapter's repository: no pictures, and no pickles."""
_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_TRANSPORT = ("httpx", "httpx2", "requests", "urllib3")


def check_repository(name: str, what: str = "--repo") -> None:
    """Refuse a name that no repository can have.

    Args:
        what: The option or setting that it was given by, for the message.
    """
    if not re.fullmatch(_NAME, name):
        raise UserError(f"{what} {name!r}: expected USER/NAME, of letters, digits, '-', '_' and '.'.")


def is_repository(path: str | Path) -> bool:
    """Whether a path stands for a repository of the hub, USER/NAME or USER/NAME@REVISION.

    What is on the disk goes first: a name in a folder USER that is here is a path, and a wrong one stays on this
    machine.
    """
    name, _, revision = str(path).partition("@")
    if not re.fullmatch(_NAME, name) or any(letter.isspace() for letter in revision):
        return False
    return not Path(path).exists() and not Path(name.partition("/")[0]).exists()


def is_hub_base(name: str) -> bool:
    """Whether others find a base under this name: USER/NAME, and no path of this machine."""
    return bool(re.fullmatch(_NAME, name)) and not Path(name).exists()


def local_copy(path: str | Path) -> Path:
    """The path itself; of a repository of the hub, the folder in the hub's cache with its adapter.

    Without the network, what was fetched before is used.

    Raises:
        UserError: the hub has no such repository or revision, it cannot be reached, or no adapter is in it.
    """
    if not is_repository(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    name, _, revision = str(path).partition("@")
    with hub_errors(f"{path}: no such folder here; on the hub"):
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_READ)))
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{path}: the repository holds no adapter_config.json; expected an adapter.")
    return folder


def check_can_push(repository: str) -> str | None:
    """Refuse, before long work, a repository that files cannot or should not be pushed to. Nothing changes there.

    Returns:
        The commit that the repository is at; None: there is no such repository yet.

    Raises:
        UserError: no token, no connection, no right to write, or the repository holds what this program did not push.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    check_repository(repository)
    if get_token() is None:
        raise UserError(f"{repository}: no token for the hub here. Set HF_TOKEN, or run `hf auth login`.")
    with hub_errors(repository):
        try:
            found = HfApi().model_info(repository)
        except RepositoryNotFoundError:
            HfApi().whoami()  # the hub answers 401 for what is not there, too
            return None
    others = [file.rfilename for file in found.siblings or () if file.rfilename != ".gitattributes"]
    if others and MARK not in (found.tags or ()):
        raise UserError(
            f"{repository} exists on the hub, and holds files that this program did not push, such as {others[0]}. "
            "Choose another --repo."
        )
    return found.sha


def push_files(
    repository: str, files: Mapping[str, Path], *, owned: Collection[str], message: str, private: bool = False
) -> str:
    """Make a repository hold these files, in one commit; it is made if it is not there.

    Args:
        files: By their paths in the repository.
        owned: Files and folders, at its top, that are removed from it where `files` has nothing of the name: what is
            left of an earlier push would be loaded with the new files.
        private: Of a repository that is made.

    Returns:
        Its address.

    Raises:
        UserError: as `check_can_push`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    parent, api = check_can_push(repository), HfApi()
    with hub_errors(repository):
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
        there = [file.rfilename for file in api.model_info(repository).siblings or ()] if parent else []
        gone = [name for name in there if name not in files and name.partition("/")[0] in owned]
        operations += [CommitOperationDelete(name) for name in gone]
        api.create_commit(repository, operations, commit_message=message, parent_commit=parent)
    return str(address)


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line, `what: the reason and what to do`. Raises UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"{what}: {reason}") from error


def _reason(error: BaseException) -> str | None:
    """Why a call failed, and what to do; None: it is no error of the hub or of the way to it."""
    from huggingface_hub import constants, errors

    cause: BaseException | None = error
    chain = []
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in chain:
        if isinstance(one, errors.LocalTokenNotFoundError):
            return "no token for the hub here. Set HF_TOKEN, or run `hf auth login`."
        if isinstance(one, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, and it is not in the hub's cache."
        if isinstance(one, errors.RevisionNotFoundError):
            return "the hub has the repository, but no such revision."
        if isinstance(one, errors.HfHubHTTPError):
            return _status(one)
    for one in chain:
        if type(one).__module__.partition(".")[0] in _TRANSPORT:
            return f"{constants.ENDPOINT} cannot be reached ({type(one).__name__}). Check the connection."
    for one in chain:
        if isinstance(one, errors.LocalEntryNotFoundError | errors.HFValidationError | ValueError):
            return " ".join(str(one).split())[:240]  # such as metadata of a card that the hub refuses
    return None


def _status(error: Any) -> str:
    from huggingface_hub import errors

    status = error.response.status_code
    if status == 403:
        return "the hub refuses (403): this token may not do that. Take one with the right to write there."
    if isinstance(error, errors.GatedRepoError):
        return "access is gated: accept its terms on the hub's page, with the account of your token."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository on the hub, or a private one that your token does not open."
    if status == 401:
        return "the hub does not accept the token (401). Set another HF_TOKEN, or run `hf auth login`."
    said = " ".join(str(error.server_message or "").split())[:200]
    return f"the hub answers {status}{f': {said}' if said else ''}."
