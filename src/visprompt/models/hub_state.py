"""Tuned states on the Hugging Face hub: from the local cache, else downloaded."""

import re
from os import PathLike
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from visprompt.errors import UserError, in_one_line
from visprompt.models.backbones.weights.hub import answers

PREFIX = "hf-hub:"
FILE = "tuned.safetensors"
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?")


def state_path(given: str | PathLike[str]) -> Path:
    """Return the path of a tuned state; one that begins with `hf-hub:` is found on the hub.

    As for weights of backbones, the cache is looked into before the network is, so a name without a revision
    keeps giving the file that was downloaded first.

    Args:
        given: A path, or "hf-hub:user/name", or "hf-hub:user/name@revision".

    Returns:
        The path, or the file in the cache of the hub's library.

    Raises:
        UserError: The name cannot be read, or the file is not in the cache and cannot be downloaded.
    """
    if not isinstance(given, str) or not given.startswith(PREFIX):
        return Path(given)
    match = _NAME.fullmatch(given.removeprefix(PREFIX))
    if match is None or ".." in given:
        raise UserError(f"{given} does not name a repository: give {PREFIX}USER/NAME, or USER/NAME@REVISION")
    name, revision = match[1], match[2]
    cached = try_to_load_from_cache(name, FILE, revision=revision)
    if isinstance(cached, str) and Path(cached).is_file():
        return Path(cached)
    url = f"{constants.ENDPOINT}/{name}/resolve/{revision or 'main'}/{FILE}"
    if constants.HF_HUB_OFFLINE or not answers(constants.ENDPOINT):
        raise _missing(given, url, "the hub cannot be reached")
    try:
        return Path(hf_hub_download(name, FILE, revision=revision))
    except Exception as error:  # network, disk and hub raise many kinds of exceptions
        raise _missing(given, url, f"could not be fetched ({in_one_line(error)[:200]})") from error


def _missing(given: str, url: str, why: str) -> UserError:
    return UserError(
        f"the tuned state {given} is not on this machine and {why}: download {url} on another machine, copy "
        "it here and give its path"
    )
