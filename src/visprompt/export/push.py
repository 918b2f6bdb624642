"""Upload a folder to the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from visprompt.errors import UserError, in_one_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_repository(name: str) -> None:
    """Refuse a name that is not that of a repository, and a hub that may not be asked.

    Raises:
        UserError: The message says what to give.
    """
    if not _NAME.fullmatch(name) or "--" in name or ".." in name:
        raise UserError(f"push={name} is not the name of a repository: give USER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"push={name} needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave push out")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder as one commit to a model repository, which is created if it does not exist.

    Args:
        folder: A result of `to=hub_folder`.
        name: USER/NAME.
        private: Whether a new repository can be seen by its owner alone; an old one stays as it is.

    Returns:
        The address of the commit.

    Raises:
        UserError: The hub refuses or does not answer.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add a tuned state"))
    except (HfHubHTTPError, LocalTokenNotFoundError, RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{folder} could not be pushed to {name} ({in_one_line(error)[:200]}): log in with `hf auth "
            "login` or set HF_TOKEN, and push again with overwrite=true"
        ) from error
