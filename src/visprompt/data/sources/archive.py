"""Archives: read member by member without unpacking, or unpacked with no file outside the target folder."""

import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from visprompt.data.sources.content import Found, Wanted
from visprompt.errors import UserError
from visprompt.text import has_control

_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    RecursionError,  # of JSON that is nested too deeply
    NotImplementedError,
)


_LARGEST = 2**31  # bytes of a member that is read at once; far above that of any dataset
_SPACE = 2**30, 100  # an archive may unpack to this number of bytes, or to this multiple of its size
_CHUNK = 2**20


class Member(NamedTuple):
    """One file of an archive; valid until the next one is asked for.

    Attributes:
        name: Its path in the archive, with forward slashes and no leading "./".
        read: Returns its content.
        open: Opens it, for large files and for archives inside archives; to be read within `readable`.
    """

    name: str
    read: Callable[[], bytes]
    open: Callable[[], IO[bytes]]


def damaged(path: Path, reason: object) -> UserError:
    """Return the error for a file with damaged bytes.

    Args:
        path: The file.
        reason: What is wrong, as text or as the reader's exception.
    """
    text = str(reason) or type(reason).__name__
    return UserError(f"{path} is truncated or damaged ({text}): delete it and run the same command again")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise one sentence that names the file for every error of reading it.

    Raises:
        UserError: The file is missing, truncated or damaged.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"there is no file {error.filename or path}: get it, or run prepare.py again"
        ) from error
    except _DAMAGE as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read ({error.strerror or error}): repair it or get it again"
        ) from error


def unpacked(path: Path) -> Path:
    """Return an archive's path; where it is missing, the folder of the same name that it was unpacked to."""
    folder = path.with_name(path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".zip"))
    return folder if not path.exists() and folder.is_dir() else path


def members(path: Path, stream: IO[bytes] | None = None) -> Iterator[Member]:
    """Yield the files of a tar archive (plain or gzip), a zip archive or a folder, in their order there.

    Args:
        path: Archive or folder; the files of a folder are sorted and named relative to it.
        stream: A tar archive inside another archive, from `Member.open`; `path` is then used in errors only.

    Yields:
        Files; folders and links are left out.

    Raises:
        UserError: The archive is missing, truncated or damaged; a member's `read` may raise it too.
    """
    with readable(path):
        if stream is not None:
            yield from _tar_members(path, stream)
        elif path.is_dir():
            yield from _folder_members(path)
        else:
            with path.open("rb") as file:
                kind = _zip_members if file.read(2) == b"PK" else _tar_members
                file.seek(0)
                yield from kind(path, file)


@contextmanager
def by_name(path: Path) -> Iterator[dict[str, Member]]:
    """Open a zip archive or a folder whose files are read in any order, and from several threads.

    Args:
        path: Archive or folder.

    Yields:
        Name -> file; valid in the `with`.

    Raises:
        UserError: The archive is missing, truncated or damaged; a member's `read` may raise it too.
    """
    with readable(path):
        if path.is_dir():
            yield {member.name: member for member in _folder_members(path)}
            return
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield {member.name: member for member in _members_of(path, archive)}


def _member(path: Path, name: str, opener: Callable[[], IO[bytes]]) -> Member:
    def read() -> bytes:
        with readable(path), opener() as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise _too_large(path)
        return content

    return Member(name, read, opener)


def _folder_members(path: Path) -> Iterator[Member]:
    for file in sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink()):
        yield _member(file, file.relative_to(path).as_posix(), partial(_open, file))


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def _zip_members(path: Path, stream: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(stream) as archive:
        yield from _members_of(path, archive)


def _members_of(path: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        name = _clean(info.filename)
        if not name.endswith("/") and not stat.S_ISLNK(info.external_attr >> 16):
            yield _member(path, name, partial(archive.open, info))


class _Bytes:
    """The stream of a tar archive, with a flag that says whether its last byte was reached.

    A complete tar ends with blocks of zeros, and tarfile does not read beyond them. In a tar that was cut
    between two members tarfile reaches the end of the stream instead, and silently takes it for the end of
    the archive.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        head = cast(io.BufferedReader, stream).peek(2)  # not by suffix: dtd-r1.0.1.tar.gz is a plain tar
        self._stream = cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if head[:2] == b"\x1f\x8b" else stream
        self.ended = False

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.ended = not data
        return data


def _tar_members(path: Path, stream: IO[bytes]) -> Iterator[Member]:
    data = _Bytes(stream)
    # r| never seeks back, which would decompress 39 GB of gzip again
    with tarfile.open(fileobj=cast(Any, data), mode="r|") as archive:
        while (info := archive.next()) is not None:
            cast(Any, archive).members.clear()  # or the headers of all members stay in memory
            if info.isfile():
                yield _member(path, _clean(info.name), partial(_extract, archive, info))
    if data.ended:
        raise tarfile.ReadError("unexpected end of data")
    while data.read(1 << 16):  # gzip's checksum is at the end
        pass


def _extract(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    return cast(IO[bytes], archive.extractfile(info))  # a file: never None


def _clean(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def pick(found: Iterable[Member], key_of: Callable[[str], str | None], wanted: Wanted) -> Iterator[Found]:
    """Yield the wanted images among an archive's members, still encoded, and stop after the last one.

    Args:
        found: The members.
        key_of: Returns the key of a member by its name; None, or any other string, where it is not an image.
        wanted: Official split -> keys; no key is in two splits.

    Yields:
        Each wanted image once, in the order of the members.
    """
    split_of = {key: split for split, keys in wanted.items() for key in keys}
    if not split_of:
        return
    for member in found:
        key = key_of(member.name)
        if key is not None and key in split_of:
            yield Found(split_of.pop(key), key, member.read())
            if not split_of:
                return


def texts(path: Path, *names: str) -> list[str]:
    """Return the content of text files in an archive, in the order of their names.

    Raises:
        UserError: The archive is damaged or lacks a member.
    """
    found: dict[str, str] = {}
    for member in members(path):
        if member.name in names:
            try:
                found[member.name] = member.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise damaged(path, f"{member.name} is not a text file") from error
            if len(found) == len(names):
                break
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path} holds no {missing[0]}: it is not the official file, get it again")
    return [found[name] for name in names]


def inside(path: Path, name: str) -> PurePosixPath:
    """Return a member's name as a relative path, after checking that it does not leave the folder.

    Raises:
        UserError: The name is absolute, climbs out or holds control characters.
    """
    clean = PurePosixPath(_clean(name))
    if (
        not clean.parts
        or clean.is_absolute()
        or ".." in clean.parts
        or ":" in clean.parts[0]
        or has_control(name)
    ):
        raise UserError(
            f"{path} holds the member {name!r}, which points outside its folder or cannot be shown: "
            "do not use this file, get it again from its official source"
        )
    return clean


def unpack(path: Path, folder: Path) -> None:
    """Unpack an archive's files into a folder, replacing existing ones; links are left out.

    Raises:
        UserError: The archive is damaged, a member points outside the folder, or the members are far larger
            than the archive.
        OSError: The folder cannot be written.
    """
    left = max(_SPACE[0], _SPACE[1] * path.stat().st_size) if path.is_file() else _LARGEST
    for member in members(path):
        target = folder / inside(path, member.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")  # an incomplete file never has its final name
        with part.open("wb") as file:
            for chunk in _chunks(path, member):
                left -= len(chunk)
                if left < 0:
                    break
                file.write(chunk)
        if left < 0:
            part.unlink()
            raise _too_large(path)
        part.replace(target)


def _chunks(path: Path, member: Member) -> Iterator[bytes]:
    """Yield a member in pieces; errors of reading are reported as damage, errors of writing are not."""
    with readable(path), member.open() as source:
        while chunk := source.read(_CHUNK):
            yield chunk


def _too_large(path: Path) -> UserError:
    return UserError(
        f"{path} unpacks to far more than such a file holds: do not use it, get it again from its official "
        "source"
    )
