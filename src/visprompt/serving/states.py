"""The tuned states of a folder or a list, by name, and the thread that follows the changes of their files."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from threading import Event, RLock, Thread

from visprompt.errors import UserError, unknown
from visprompt.models.bank import Bank
from visprompt.models.prepared import Task
from visprompt.models.tuned_state import load_state
from visprompt.serving.refused import Refused

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_HASH = re.compile(r"[0-9a-f]{12}")  # what a run's folder is called
_FILE = "tuned.safetensors"
_SUFFIX = ".safetensors"

Source = Callable[[], dict[str, Path]]
"""Returns the files that there are at present, by the names of their tasks"""
_Signature = tuple[int, int, int]


@dataclass
class Entry:
    """A state and what became of it.

    Attributes:
        name: The task's name.
        path: The state's file.
        signature: The file's time, size and inode when it was last loaded, or tried.
        reason: Why it could not be loaded; None if it could.
        unloaded: Whether a client has unloaded it.
    """

    name: str
    path: Path
    signature: _Signature
    reason: str | None = None
    unloaded: bool = False

    @property
    def ready(self) -> bool:
        """Whether the task answers."""
        return self.reason is None and not self.unloaded


def source_of(states: str | Sequence[str]) -> Source:
    """Return where states are looked for.

    Args:
        states: A folder of states, a state, or a list of states. A state is a run's folder or its file.

    Raises:
        UserError: There is no such folder or file, or two states of a list have one name.
    """
    if isinstance(states, str) and Path(states).is_dir() and not (Path(states) / _FILE).is_file():
        return lambda: _in_folder(Path(states))
    listed: dict[str, Path] = {}
    for state in [states] if isinstance(states, str) else states:
        path = Path(state) / _FILE if Path(state).is_dir() else Path(state)
        if not path.is_file():
            raise UserError(
                f"there is no tuned state at states={state}: give a folder of states, a finished run's "
                "folder, or a list of these"
            )
        name = load_state(path).task if path.name == _FILE else path.name.removesuffix(_SUFFIX)
        name = _as_name(name)
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path} has the name {name!r}: put it into a folder under a name such as birds{_SUFFIX}"
            )
        if name in listed:
            raise UserError(
                f"{listed[name]} and {path} would both be task {name}: put them into a folder under two "
                "names, and give that folder"
            )
        listed[name] = path
    return lambda: {name: path for name, path in listed.items() if path.is_file()}


def _in_folder(folder: Path) -> dict[str, Path]:
    """Return the states of a folder: NAME.safetensors, a run's folder NAME, or a folder NAME of runs."""
    found: dict[str, Path] = {}
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix == _SUFFIX and _NAME.fullmatch(path.stem):
                found[path.stem] = path
            elif _NAME.fullmatch(name := _as_name(path.name)) and (file := _if_readable(path)) is not None:
                found.setdefault(name, file)
    except OSError as error:
        raise UserError(
            f"states={folder} cannot be read ({error.strerror}): give a folder of states"
        ) from error
    return found


def _if_readable(folder: Path) -> Path | None:
    """Return the state of a folder as `_of_run` does; None if it may not be read, as lost+found."""
    try:
        return _of_run(folder)
    except PermissionError as error:  # other errors may pass: they end the look, and what is loaded stays
        _say_unreadable(folder, str(error.strerror))
        return None


@lru_cache
def _say_unreadable(folder: Path, reason: str) -> None:
    """Say once, and not at every look, that a folder is left out."""
    _log.warning("%s cannot be read (%s): it is left out", folder, reason)


def _as_name(text: str) -> str:
    """Return a name that can stand in an address, such as My_Photos for "My Photos"."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)


def _of_run(folder: Path) -> Path | None:
    """Return the state of a run's folder, or that of the newest run in a folder METHOD/HASH of one task."""
    if (folder / _FILE).is_file():
        return folder / _FILE
    runs = [file for file in folder.glob(f"*/*/{_FILE}") if _HASH.fullmatch(file.parent.name)]
    return max(runs, key=lambda file: (_signature(file), file), default=None)


_LONG = 0.2  # seconds


class States:
    """Keeps the tasks of a bank equal to the files of a source.

    Its methods may be called in any thread. A name from a request is looked up among the files that the
    source lists and never becomes part of a path.

    Args:
        bank: The bank.
        source: Where the states are.
    """

    def __init__(self, bank: Bank, source: Source) -> None:
        self._bank = bank
        self._source = source
        self._entries: dict[str, Entry] = {}
        self._lock = RLock()
        self._next_refresh = 0.0  # the earliest time of the next refresh for a request
        self._stop = Event()
        self._thread: Thread | None = None

    @property
    def entries(self) -> list[Entry]:
        """All states, by name."""
        with self._lock:
            return [self._entries[name] for name in sorted(self._entries)]

    def task(self, name: str) -> Task:
        """Return a task that answers; a state that has just come into the folder is loaded now.

        Raises:
            Refused: There is no such task, it was unloaded, or its state cannot be loaded.
        """
        try:
            return self._bank.task(name)
        except UserError:  # it is not loaded yet, or its file has changed or gone
            with suppress(UserError):  # the folder is gone; the thread says so
                self._refresh_for_a_request()
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and entry.unloaded:
                raise Refused(404, f"task {name} is unloaded: load it with POST /v1/tasks/{name}/load")
        if entry is None:
            raise Refused(404, str(unknown("task", name, self._bank.names)))
        try:
            return self._bank.task(name)
        except UserError as error:
            _log.warning("task %s cannot be loaded: %s", name, error)
            raise Refused(503, f"task {name} cannot be loaded: the log of the service says why") from error

    def entry(self, name: str) -> Entry:
        """Return what is known of a state.

        Raises:
            Refused: No state has this name.
        """
        with self._lock:
            if name not in self._entries:
                with suppress(UserError):  # the folder is gone; the thread says so
                    self._refresh_for_a_request()
            if name not in self._entries:
                raise Refused(404, str(unknown("task", name, self._entries)))
            return self._entries[name]

    def load(self, name: str) -> Task:
        """Load a state from its file, also if it was loaded before.

        Raises:
            Refused: There is no such file, or it cannot be loaded; what was loaded before stays.
        """
        with self._lock:
            try:
                self.refresh()
            except UserError as error:
                raise Refused(503, str(error)) from error
            entry = self.entry(name)
            entry.unloaded = False
            self._load(entry, _signature(entry.path))
            if entry.reason is not None:
                raise Refused(422, entry.reason)
            return self._bank.task(name)

    def unload(self, name: str) -> None:
        """Free a task, until it is loaded again; requests that have begun are answered.

        Raises:
            Refused: No state has this name.
        """
        with self._lock:
            entry = self.entry(name)
            entry.unloaded = True
            self._remove(name)
            _log.info("task %s is unloaded", name)

    def refresh(self) -> None:
        """Load states that are new or have changed, and remove those whose files are gone."""
        with self._lock:
            began = time.monotonic()
            files = self._source()
            took = time.monotonic() - began
            self._next_refresh = began + (10 * took if took > _LONG else 0)
            for name in self._entries.keys() - files.keys():
                del self._entries[name]
                self._remove(name)
                _log.info("task %s is removed: its file is gone", name)
            for name, path in files.items():
                signature, entry = _signature(path), self._entries.get(name)
                if entry is None:
                    entry = self._entries[name] = Entry(name, path, (0, 0, 0))
                entry.path = path
                if signature != entry.signature and not entry.unloaded:
                    self._load(entry, signature)

    def _refresh_for_a_request(self) -> None:
        """Refresh; a folder of so many runs that listing it takes long is not listed for every request."""
        with self._lock:
            if time.monotonic() >= self._next_refresh:
                self.refresh()

    def watch(self, seconds: float) -> None:
        """Refresh every some seconds, in a thread, until `close`."""
        self._thread = Thread(target=self._watch, args=(seconds,), name="states", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, seconds: float) -> None:
        said = ""
        while not self._stop.wait(seconds):
            try:
                self.refresh()
                said = ""
            except UserError as error:  # the folder is gone, for a while perhaps: what is loaded stays
                if str(error) != said:
                    _log.warning("%s", error)
                said = str(error)

    def _load(self, entry: Entry, signature: _Signature) -> None:
        entry.signature, entry.reason = signature, None
        try:
            task = self._bank.add(entry.name, entry.path)
        except UserError as error:  # half a copy, or of another backbone
            entry.reason = str(error)
            _log.warning("task %s is not loaded: %s", entry.name, error)
        except Exception:  # a bug, or a full memory, must not end the service
            entry.reason = f"{entry.path} cannot be loaded: the log of the service says why"
            _log.exception("task %s is not loaded", entry.name)
        else:
            _log.info(
                "task %s is loaded: %d classes, %d bytes", entry.name, len(task.class_names), task.nbytes
            )

    def _remove(self, name: str) -> None:
        if name in self._bank.names:
            self._bank.remove(name)


def _signature(path: PathLike[str]) -> _Signature:
    """Return what changes when a file is written or replaced; zeros if it is gone."""
    try:
        status = Path(path).stat()
    except OSError:
        return (0, 0, 0)
    return status.st_mtime_ns, status.st_size, status.st_ino
