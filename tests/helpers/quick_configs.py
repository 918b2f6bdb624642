"""What is the same in every composition of a worker is read, parsed and merged once: most of what tests wait for.

A composition loads some 25 YAML files and parses their references in pure Python, and tests compose thousands
of times, nearly always from the same files and groups. What Hydra makes of these is a function of the texts
alone, so it is kept here, pickled, and everybody gets a copy of their own. Settings of the command line are
applied by Hydra each time, and so is everything behind it: `Job`, its checks, what the environment says.
Processes that a test starts (src/train.py and so on) have none of this.
"""

import functools
import pickle
import sys
from typing import Any

import hydra._internal.config_loader_impl as loader
import omegaconf.grammar_parser as grammar
from hydra._internal.defaults_list import DefaultsList, Overrides
from omegaconf import OmegaConf

from helpers.cli import ROOT

_load, _parse = OmegaConf.load, grammar.parse
_choose, _merge = loader.create_defaults_list, loader.ConfigLoaderImpl._compose_config_from_defaults_list
_texts: dict[str, bytes] = {}
_merged: dict[str, bytes] = {}
_chosen: dict[Any, DefaultsList] = {}
# Folders of a test's own are not among them: their files may change.
_FIXED = {f"file://{ROOT / 'configs'}", "pkg://hydra.conf", "structured://", None}


def load(file: Any) -> Any:
    """`OmegaConf.load`: a text that was loaded before is not parsed again."""
    if not hasattr(file, "read"):
        with open(file, encoding="utf-8") as opened:  # noqa: PTH123 - as OmegaConf does, with its errors
            return load(opened)
    text = file.read()
    if text not in _texts:
        file.seek(0)
        _texts[text] = pickle.dumps(_load(file))
    return pickle.loads(_texts[text])


def _fixed(repo: Any) -> bool:
    return {source.full_path() for source in repo.get_sources()} <= _FIXED


def create_defaults_list(
    repo: Any, config_name: str | None, overrides_list: list[Any], prepend_hydra: bool, skip_missing: bool
) -> DefaultsList:
    """Hydra's list of the files to merge, which the chosen groups decide and no other setting."""
    values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
    groups = [override for override in overrides_list if override not in values]
    key = (config_name, tuple(override.input_line for override in groups), prepend_hydra, skip_missing)
    if not _fixed(repo):
        return _choose(repo, config_name, overrides_list, prepend_hydra, skip_missing)
    if key not in _chosen:
        _chosen[key] = _choose(repo, config_name, groups, prepend_hydra, skip_missing)
    found = _chosen[key]
    return DefaultsList(found.defaults, found.defaults_tree, values, found.overrides)


def merge(self: Any, defaults: list[Any], repo: Any) -> Any:
    """Merge the files of such a list: the same files give the same config."""
    if not _fixed(repo):
        return _merge(self, defaults, repo)
    key = repr(defaults)
    if key not in _merged:
        _merged[key] = pickle.dumps(_merge(self, defaults, repo))
    return pickle.loads(_merged[key])


def install() -> None:
    """Put these in the place of the libraries' own functions, for all of this process."""
    OmegaConf.load = staticmethod(load)
    loader.create_defaults_list = create_defaults_list
    loader.ConfigLoaderImpl._compose_config_from_defaults_list = merge
    # a tree of a reference such as ${paths.log_dir} is only read
    parsed = functools.cache(_parse)
    for module in list(sys.modules.values()):
        if getattr(module, "parse", None) is _parse:
            module.parse = parsed
