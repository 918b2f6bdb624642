"""Distinguish split folders from class folders: "Training" and "Testing" must not become classes.

Only `train`, `val` and `test` are read as splits. Folders that look like splits raise an error that says what
to type: `data.split_names={train: Training, test: Testing}` names the split folders, `data.split_names=none`
declares all folders to be classes.
"""

import re
import shlex
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from visprompt.data.sources.walk import entries, folders_in
from visprompt.data.splits import SPLITS
from visprompt.errors import UserError, unknown

_WORDS = {
    "train": ("train", "training", "trainval", "trn"),
    "val": ("val", "valid", "validation", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst", "holdout"),
}
_ENDINGS = "s|set|sets|data|dataset|datasets|split|splits|image|images|imgs|img|pics|photos|samples|files"
_PATTERNS = {
    split: re.compile(rf"(?:{'|'.join(words)})(?:{_ENDINGS})?", re.ASCII) for split, words in _WORDS.items()
}
_VIEW = re.compile(
    r"front|back|rear|side|left|right|top|bottom|above|below|near|far|inside|outside|indoors?|outdoors?|day|night"
    r"|view|angle|cam|camera|session|sample|scan|shot|frame|crops?|raw|originals?|augmented|colou?r|gr[ae]y"
)
_MOST_PARTS = 10  # more folders with the same sub-folders than this are classes


def split_of(name: str) -> str:
    """Return the split that a folder's name or a value in a CSV stands for, "" for any other name.

    Case, separators, plurals, prefixes and suffixes are ignored: "Testing", "my-test-set", "train_images" and
    "valImages" name splits, "contest" does not.
    """
    return next(
        (split for word in words_of(name) for split in _PATTERNS if _PATTERNS[split].fullmatch(word)), ""
    )


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case: "trainImages_2017" has the words train and images."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", name))
    return re.findall(r"[^\W\d_]+", apart.casefold())


@dataclass(frozen=True)
class _Top:
    """A folder directly below the root, with its entries."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def split(self) -> str:
        return split_of(self.name)

    @property
    def whole(self) -> bool:
        """Return whether the name is the word for a split and nothing else."""
        return bool(self.split) and len(words_of(self.name)) == 1

    @cached_property
    def _inside(self) -> tuple[tuple[str, ...], int]:
        folders, files = entries(self.path)
        return tuple(entry.name for entry in folders), len(files)

    @property
    def folders(self) -> tuple[str, ...]:
        return self._inside[0]

    @property
    def bare(self) -> bool:
        """Return whether it has folders and no images: two folders or more, and fewer files than folders."""
        folders, files = self._inside
        return len(folders) > max(1, files)


def class_parents(root: Path, split_names: Mapping[str, Any] | str | None) -> list[tuple[str, Path]]:
    """Return the folders that hold the class folders, each with its split: "" for the root itself.

    Args:
        root: The folder of the data, with at least one folder in it.
        split_names: "none" where all folders are classes; `{train: Training, test: [Test1, Test2]}` names the
            split folders and leaves the others out; None reads `train`, `val` and `test` as splits.

    Raises:
        UserError: The folders look like splits, or `split_names` names other folders.
    """
    tops = [_Top(folder) for folder in folders_in(root)]
    if split_names == "none":
        return [("", root)]
    if split_names is not None:
        return [(split, root / name) for split, name in _named(root, tops, split_names)]
    if _are_exact(tops):
        return [(split, root / split) for split in SPLITS if any(top.name == split for top in tops)]
    _refuse_splits(root, tops)
    return [("", root)]


def named_splits(split_names: Mapping[str, Any] | str) -> dict[str, str]:
    """Return the split of each name in `data.split_names`: name -> split.

    Raises:
        UserError: It does not map train, val and test to names, lacks train, or has a name twice.
    """
    if not isinstance(split_names, Mapping):
        raise UserError(
            f"data.split_names={split_names} names no splits: give "
            f"'data.split_names={{train: NAME, test: NAME}}', "
            "or data.split_names=none where all folders are classes"
        )
    found: dict[str, str] = {}
    for split, given in split_names.items():
        if split not in SPLITS:
            raise unknown("split in data.split_names", split, SPLITS)
        for name in (
            [given] if isinstance(given, str) else given if isinstance(given, list | tuple) else [None]
        ):
            if type(name) not in (str, int) or name == "":  # Hydra reads 2012 as a number
                raise UserError(
                    f"data.split_names.{split}={given} is not a name: give one, or a list of names"
                )
            if str(name) in found:
                raise UserError(f"data.split_names gives {str(name)!r} twice: each name belongs to one split")
            found[str(name)] = split
    if "train" not in found.values():
        raise UserError("data.split_names lacks train: add 'train: NAME' to it")
    return found


def _named(root: Path, tops: Sequence[_Top], split_names: Mapping[str, Any] | str) -> list[tuple[str, str]]:
    named = named_splits(split_names)
    for name in named:
        if name not in [top.name for top in tops]:
            raise unknown(f"folder of data.split_names in {root}:", name, [top.name for top in tops])
    return sorted(((split, name) for name, split in named.items()), key=lambda pair: SPLITS.index(pair[0]))


def _are_exact(tops: Sequence[_Top]) -> bool:
    """Return whether the folders are named train, val and test, with class folders in train."""
    names = {top.name for top in tops}
    return (
        names <= set(SPLITS) and "train" in names and bool(next(t for t in tops if t.name == "train").folders)
    )


def _refuse_splits(root: Path, tops: Sequence[_Top]) -> None:
    """Raise an error with the option to type where folders look like splits."""
    carrying, others = [top for top in tops if top.split], [top for top in tops if not top.split]
    if carrying and not others and (len(carrying) > 1 or carrying[0].folders):
        raise _refusal(root, f"has split folders ({_some(carrying)})", carrying)
    if others and len({top.split for top in carrying if top.whole}) > 1:
        raise _refusal(root, f"has split folders ({_some(carrying)}) next to {_some(others)}", carrying)
    for top in carrying:
        if top.bare and _is_part(top, others):
            raise _refusal(
                root, f"has what looks like a split folder ({top.name!r}) next to {_some(others)}", [top]
            )
    if len(tops) == 1 and tops[0].folders:
        raise UserError(
            f"data.root={root} has only the folder {tops[0].name!r}: give data.root={tops[0].path} if the "
            "classes or the splits are in it"
        )
    for top in tops:
        inner = [name for name in top.folders if split_of(name)]
        if len({split_of(name) for name in inner}) > 1:
            raise UserError(
                f"data.root={root} has split folders in its classes ({top.name}/{inner[0]}, "
                f"{top.name}/{inner[1]}): "
                f"move the images to {inner[0]}/{top.name} and so on, or give data.split_names=none to mix "
                "them"
            )
    if len(tops) <= _MOST_PARTS and all(top.bare for top in tops):
        shared, every = _shared(tops), set().union(*(top.folders for top in tops))
        if len(shared) > 1 and 2 * len(shared) >= len(every) and not _are_classes(tops, shared):
            raise _refusal(
                root, f"has the same folders ({_some(shared)}) in each of its folders ({_some(tops)})", tops
            )


def _is_part(top: _Top, others: Sequence[_Top]) -> bool:
    """Return whether a folder with a split's word in its name holds classes, not views of one class."""
    classes = {other.name for other in others}
    return 2 * len(classes & set(top.folders)) >= len(top.folders) or not _are_classes(
        [top, *others], top.folders
    )


def _shared(tops: Sequence[_Top]) -> set[str]:
    """Return the names that most of the folders have in them."""
    every = [name for top in tops for name in top.folders]
    return {name for name in every if 2 * every.count(name) > len(tops)}


def _are_classes(tops: Sequence[_Top], inner: Collection[str]) -> bool:
    """Return whether folders are classes with sub-folders, such as dog/{front,side}.

    Either the inner folders are named after views (or dates), or the outer ones have names of ImageNet
    classes and most of the inner ones do not.
    """
    if all(_is_view(name) for name in inner):
        return True
    known = _imagenet_names()
    things = sum(_plain(name) in known for name in inner)
    return all(_plain(top.name) in known for top in tops) and 2 * things <= len(inner)


def _is_view(name: str) -> bool:
    words = words_of(name)
    if not words:  # a year or a date
        return bool(re.fullmatch(r"(19|20)\d\d([-_.]?\d\d){0,2}", name))
    return any(_VIEW.fullmatch(word) for word in words) and all(
        _VIEW.fullmatch(w) or len(w) == 1 for w in words
    )


def _plain(name: str) -> str:
    return " ".join(words_of(name))


@lru_cache(maxsize=1)
def _imagenet_names() -> frozenset[str]:
    """Return the names of ImageNet's 21,843 classes, of three letters or more."""
    from timm.data import ImageNetInfo  # imported late: only folders that look like splits need it

    info = ImageNetInfo("imagenet21k")
    lemmas = (info.index_to_description(index, detailed=False) for index in range(info.num_classes()))
    return frozenset(_plain(name) for names in lemmas for name in names.split(",") if len(name.strip()) > 2)


def _refusal(root: Path, what: str, splits: Sequence[_Top]) -> UserError:
    guess = guess_splits([top.name for top in splits])
    classes = "data.split_names=none where all folders are classes"
    if hollow := [top.name for top in splits if top.split == "train" and not top.folders]:
        return UserError(
            f"data.root={root} {what}, but {hollow[0]!r} has no class folders in it: put the images of each "
            f"class into {hollow[0]}/<class>/, or give {classes}"
        )
    if "train" not in guess:
        return UserError(
            f"data.root={root} {what} but no folder of training images: put these into train/<class>/, or "
            f"give {classes}"
        )
    return UserError(f"data.root={root} {what}: give {as_argument(guess)} to read them so, or {classes}")


def guess_splits(names: Sequence[str]) -> dict[str, list[str]]:
    """Return names by split; of names without a split's word the first is for train, the last for test."""
    guess: dict[str, list[str]] = {}
    for name in names:
        guess.setdefault(split_of(name), []).append(name)
    rest = guess.pop("", [])
    for split in ("test", "train", "val") if "train" in guess else ("train", "test", "val"):
        if rest and split not in guess:
            guess[split] = [rest.pop(0 if split == "train" else -1)]
    if rest:
        guess["train"] += rest
    return {split: guess[split] for split in SPLITS if split in guess}


def as_argument(splits: Mapping[str, Sequence[str]]) -> str:
    """Return `data.split_names=...` quoted for a shell: `'data.split_names={train: Training}'`."""
    parts = []
    for split, names in splits.items():
        written = [name if re.fullmatch(r"[A-Za-z][\w.-]*", name) else _quoted(name) for name in names]
        parts.append(f"{split}: {written[0] if len(written) == 1 else '[' + ', '.join(written) + ']'}")
    return shlex.quote(f"data.split_names={{{', '.join(parts)}}}")


def _quoted(name: str) -> str:
    """Return a string quoted for Hydra's grammar."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), name) + '"'


def _some(names: Collection[str] | Sequence[_Top]) -> str:
    first = sorted(name.name if isinstance(name, _Top) else name for name in names)[:3]
    return ", ".join(map(repr, first)) + (", ..." if len(names) > 3 else "")
