"""Pre-trained weights that timm names: from a local cache, else downloaded from the hub."""

from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from timm.models import PretrainedCfg

from visprompt.errors import UserError

_TIMEOUT = (5.0, 30.0)  # seconds to connect, and for a slow mirror to answer; the hub's client tries longer
_NAMES = ("model.safetensors", "pytorch_model.bin")  # tried in order, if timm's config names no file


def hub_file(name: str) -> Path:
    """Find the file of a timm model's pre-trained weights; download it if no local cache holds it.

    Args:
        name: The model's name, with or without a pre-training tag.

    Raises:
        UserError: timm has no weights for it, or they cannot be downloaded; the message says what to do.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        tags = timm.list_models(f"{name.split('.')[0]}*", pretrained=True)
        raise UserError(
            f"timm has no pre-trained weights for backbone {name}: "
            f"choose one of {', '.join(tags[:5]) or 'timm.list_models(pretrained=True)'}, or give "
            "backbone.weights=FILE"
        )
    names = (config.hf_hub_filename,) if config.hf_hub_filename else _NAMES
    for file in names:
        cached = (
            try_to_load_from_cache(config.hf_hub_id, file) if config.hf_hub_id else str(_downloaded(config))
        )
        if isinstance(cached, str) and Path(cached).is_file():
            return Path(cached)
    url = _address(config)
    if config.hf_hub_id:
        url = f"{constants.ENDPOINT}/{config.hf_hub_id}/resolve/main/{names[0]}"
    if constants.HF_HUB_OFFLINE or not answers(constants.ENDPOINT if config.hf_hub_id else url):
        raise _missing(name, url, "the hub cannot be reached")
    try:
        return _fetch(config, names)
    except Exception as error:  # network, disk and hub raise many kinds of exceptions
        raise _missing(name, url, f"could not be fetched ({' '.join(str(error).split())[:200]})") from error


def _address(config: PretrainedCfg) -> str:
    # some configs have a pair of a URL and a file's name
    return config.url if isinstance(config.url, str) else (config.url or ("",))[0]


def _downloaded(config: PretrainedCfg) -> Path:
    """Return the path at which torch.hub caches the file of a plain URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(_address(config)).path).name


def _fetch(config: PretrainedCfg, names: tuple[str, ...]) -> Path:
    if not config.hf_hub_id:
        file = _downloaded(config)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_address(config), str(file))
        return file
    for name in names[:-1]:
        try:
            return Path(hf_hub_download(config.hf_hub_id, name))
        except EntryNotFoundError:
            continue  # an older repository without safetensors
    return Path(hf_hub_download(config.hf_hub_id, names[-1]))


def _missing(name: str, url: str, why: str) -> UserError:
    place = f"data/backbones/{name}{''.join(Path(url).suffixes[-1:])}"
    return UserError(
        f"the weights of backbone {name} are not on this machine and {why}: download {url} "
        f"on another machine, copy it here to {place} and set backbone.weights={place}"
    )


def answers(address: str) -> bool:
    """Return whether a server answers at an address, through a proxy if one is set."""
    import requests  # imported late: weights are downloaded once

    try:
        requests.head(address, timeout=_TIMEOUT)
    except (OSError, ValueError):  # no network, or no address
        return False
    return True
