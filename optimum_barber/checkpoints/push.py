"""Publishing a checkpoint: all of its files, and no other, to a repository on the Hub."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base.errors import BarberError, FailedCheckError
from ..base.files import is_there, leads_out, read_json_object
from ..models.loading import brief
from .carry import TEMPLATES
from .names import ADAPTER_CONFIG_NAME, SPARSITY_NAME
from .verify import verify_checkpoint

logger = logging.getLogger(__name__)
MESSAGE = "Upload with optimum-barber"


class Published:
    """Base of the results that were written: they can be pushed to the Hub, as a transformers model can.

    Attributes:
        directory: where the checkpoint lies; None where it was not written.
    """

    directory: Path | None = None

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the checkpoint; see `push_to_hub`, whose options are taken.

        Raises:
            BarberError: the result was not written (`save_dir`), or as `push_to_hub`.
        """
        if self.directory is None:
            raise BarberError("push_to_hub needs a written checkpoint: give save_dir")
        return push_to_hub(self.directory, repo_id, **options)


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = MESSAGE,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> Any:
    """Upload a checkpoint, or an adapter, after a check of every zero; the repository is created if need be.

    Args:
        directory: what `prune` or a later step wrote.
        repo_id: name on the Hub: owner/name, or a name of your own.
        private: whether a new repository is private; None for the owner's default.
        revision: branch; None for the main one. It is created if need be.
        commit_message: first line of the commit.
        create_pr: open a pull request instead of committing.
        token: as everywhere in huggingface_hub; None for the one of the login.

    Returns:
        The commit, `huggingface_hub.CommitInfo`.

    Raises:
        BarberError: no checkpoint, an illegal name, no login, or a refusal of the Hub.
        FailedCheckError: the masks do not hold; nothing was uploaded.
    """
    files_of(directory)
    check_masks_hold(Path(directory))
    return upload(
        directory, repo_id, private=private, revision=revision, commit_message=commit_message, create_pr=create_pr,
        token=token,
    )  # fmt: skip


def upload(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
    token: str | bool | None = None,
) -> Any:
    """Upload a checkpoint that was checked; see `push_to_hub`."""
    from huggingface_hub import HfApi

    warn_of_local_base(Path(directory))
    files = [path.relative_to(directory).as_posix() for path in files_of(directory)]
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=directory, commit_message=commit_message, revision=revision,
            create_pr=create_pr, allow_patterns=files,
        )  # fmt: skip
    except Exception as error:  # of the Hub, or of whichever HTTP client it uses
        raise BarberError(f"repository {repo_id!r} cannot be written: {brief(error)}") from None


def files_of(directory: str | Path) -> list[Path]:
    """Return the files of a checkpoint that are published: no hidden ones, no links to other places.

    Raises:
        BarberError: it is no checkpoint and no adapter.
    """
    directory = Path(directory)
    if not any((directory / name).is_file() for name in ("config.json", ADAPTER_CONFIG_NAME)):
        raise BarberError(f"{directory} is no checkpoint: it has no config.json")
    return sorted(_published(directory))


def _published(directory: Path) -> Iterator[Path]:
    for folder in (directory, directory / TEMPLATES):
        for path in folder.iterdir() if folder.is_dir() else ():
            hidden = path.name.startswith(".") or path.name.endswith(".partial")
            if path.is_file() and not hidden and not leads_out(path):
                yield path


def warn_of_local_base(directory: Path) -> None:
    """Warn of an adapter whose base is a folder of this machine: it loads nowhere else."""
    path = directory / ADAPTER_CONFIG_NAME
    base = read_json_object(path).get("base_model_name_or_path") if path.is_file() else None
    if isinstance(base, str) and is_there(base):
        logger.warning(
            "adapter %s names its base by a folder of this machine, %s: elsewhere nobody finds it", path, base
        )


def check_masks_hold(directory: Path) -> None:
    """Refuse, by the first fault, a checkpoint whose masks do not hold."""
    if (directory / SPARSITY_NAME).is_file():
        for fault in verify_checkpoint(directory).faults:
            raise FailedCheckError(f"{directory} is not what its record says: {fault}; nothing was uploaded")
