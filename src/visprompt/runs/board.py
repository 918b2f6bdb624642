"""What holding a run needs of the folder and the store that it is in, see `lease` and `run_lock`."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

PREFIX = "lease-"
"""The name of a lease is this and its number."""


def numbers(names: Iterable[str]) -> list[int]:
    """Return the numbers of the leases among some names, in increasing order."""
    found = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return sorted(int(number) for number in found if number.isdecimal())


class Board(Protocol):
    """Where the leases of one run are kept; `FolderBoard` and `RemoteRun` are boards."""

    def lease_numbers(self) -> list[int]:
        """Return the numbers of all leases, in increasing order."""

    def read_lease(self, number: int) -> str | None:
        """Return the text of a lease, or None if it is gone."""

    def create_lease(self, number: int, text: str) -> bool:
        """Create a lease; return False if the number has been created before."""

    def write_lease(self, number: int, text: str) -> None:
        """Replace the text of a lease."""

    def remove_lease(self, number: int) -> None:
        """Remove a lease that is not the newest."""


class Remote(Board, Protocol):
    """The same run in a store that machines share; `RemoteRun` is one."""

    @property
    def url(self) -> str:
        """Return where it is."""

    def pull(self) -> bool:
        """Bring what is newer; return False if the local folder has a finished run that the store lacks."""

    def push_state(self) -> None:
        """Store the resume state."""

    def push_finished(self) -> bool:
        """Store the finished run; return False if the store has that of another process."""


@dataclass(frozen=True)
class FolderBoard:
    """Leases as files `lease-<number>` of a folder."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def lease_numbers(self) -> list[int]:
        """Return the numbers of all leases, see `Board`."""
        try:
            names = os.listdir(self.folder)  # noqa: PTH208  # names alone, no paths
        except FileNotFoundError:
            return []
        return numbers(names)

    def read_lease(self, number: int) -> str | None:
        """Return the text of a lease, see `Board`."""
        try:
            return self._path(number).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def create_lease(self, number: int, text: str) -> bool:
        """Create a lease, see `Board`."""
        with self._written(number, text) as temporary:
            try:
                os.link(temporary, self._path(number))
            except FileExistsError:
                # NFS repeats a request whose answer was lost: the link may be this process's
                with suppress(FileNotFoundError):  # the holder has removed the temporary file
                    return os.stat(temporary).st_nlink == 2  # noqa: PTH116  # its two names
                return False
            except FileNotFoundError:  # likewise
                return False
            except OSError:  # a file system without hard links
                return self._create_alone(number, text)
        return True

    def write_lease(self, number: int, text: str) -> None:
        """Replace the text of a lease, see `Board`."""
        with self._written(number, text) as temporary:
            temporary.replace(self._path(number))

    def remove_lease(self, number: int) -> None:
        """Remove a lease, see `Board`."""
        self._path(number).unlink(missing_ok=True)

    def _create_alone(self, number: int, text: str) -> bool:
        try:
            with self._path(number).open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    @contextmanager
    def _written(self, number: int, text: str) -> Iterator[Path]:
        """Write a text to a temporary file, whose name `files.TEMPORARY` matches; remove it at the end."""
        temporary = self.folder / f".{PREFIX}{number}.{uuid4().hex[:8]}"
        try:
            temporary.write_text(text, encoding="utf-8")
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{PREFIX}{number}"
