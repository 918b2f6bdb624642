"""Hold a run by a lease, which also holds between machines, where locks of files may not.

The leases of a run are numbered. File systems (NFS too) and object stores guarantee that of several processes
that create the next number only one does; it holds the run until it releases it, as long as it shows that it
lives: it writes a new count into its lease several times in its life. A lease whose text stays the same for
its life, by the clock of who watches it, is revoked by creating the next number. A process that stood still
for so long finds at its next step that its lease is not the newest, and puts nothing in place. No clocks of
two machines are compared.
"""

import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visprompt.errors import UserError
from visprompt.runs import environment, signals
from visprompt.runs.board import Board

_log = logging.getLogger(__name__)
_BEATS = 6  # signs of life in the life of a lease
_TOGETHER = 16  # signs of life that are written at the same time
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_seen: dict[tuple[str, int], tuple[str, float]] = {}  # texts of watched leases, and since when they are so


class Record(BaseModel):
    """The text of a lease.

    Attributes:
        state: "free" after its release; "revoked" if another process ended it, or if it was released by one
            that could not lock the file `lock`: then the next one need not either.
        who: The holder, for messages: "process 17 on gpu3".
        host: The holder's machine, as long as it runs without a restart.
        lock: The name of the file `lock` that the holder locks, see `run_lock`; "" if it locks none.
        life: Seconds without a sign of life after which the lease may be revoked.
        beat: Number of the sign of life.
        id: Makes the text of a lease different from that of any other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Literal["held", "free", "revoked"] = "free"
    who: str = "another process"
    host: str = ""
    lock: str = ""
    life: float = Field(default=60.0, ge=1, allow_inf_nan=False)
    beat: int = 0
    id: str = ""

    @classmethod
    def of(cls, text: str) -> "Record":
        """Read a record; one that cannot be read is that of an unknown holder."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return cls(state="held")

    def but(self, **changes: Any) -> "Record":
        """Return a copy with other values."""
        return self.model_copy(update=changes)

    def text(self) -> str:
        """Return the record as JSON."""
        return self.model_dump_json()


@cache
def this_host() -> str:
    """Return a name of this machine that no other has, nor has this one after a restart."""
    boot = ""
    with suppress(OSError):
        boot = _BOOT.read_text().strip()
    return f"{platform.node()} {boot}"


def life() -> float:
    """Return the life of the leases of this process in seconds: $VISPROMPT_LEASE_S, else 60.

    Raises:
        UserError: The variable is not a number of at least 1.
    """
    text = os.environ.get("VISPROMPT_LEASE_S", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise UserError(
            f"VISPROMPT_LEASE_S={text} is not a number of seconds: give one of at least 1, or unset it"
        )
    return seconds


class Held(Exception):
    """Another process holds a run; `who` is its name for messages."""

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who


class Lease:
    """A lease of this process.

    Args:
        board: Where it is.
        number: Its number.
        record: What it says.
    """

    def __init__(self, board: Board, number: int, record: Record) -> None:
        self._board, self._number, self._record = board, number, record
        self._lost = False
        self._failures = 0  # signs of life in a row that could not be written
        self._writing = threading.Lock()  # a sign of life must not follow the release

    def beat(self) -> None:
        """Give a sign of life; one of a lease that was lost does no harm."""
        with self._writing:
            if self._record.state != "held":
                return
            self._record = self._record.but(beat=self._record.beat + 1)
            try:
                self._board.write_lease(self._number, self._record.text())
                self._failures = 0
            except (OSError, UserError) as error:
                self._failures += 1
                if self._failures == 2:  # one may fail for a moment
                    _log.warning("no sign of life can be written to %s: %s", self._board, error)

    def check(self) -> None:
        """Look whether this process still holds the run.

        Raises:
            Held: It does not, because it stood still for longer than the life of its lease.
        """
        try:
            lost = self._is_lost()
        except (OSError, UserError) as error:  # what is put in place later shows who was first
            _log.warning("whether this process still holds %s is not known: %s", self._board, error)
            return
        if lost:
            who = holder_of(newest(self._board)[1])
            _log.warning(
                "this process gave no sign of life for %g s: its run in %s is now that of %s",
                self._record.life,
                self._board,
                who,
            )
            raise Held(who)

    def release(self) -> None:
        """Give the run back; if that cannot be written, others wait for the end of the lease's life."""
        with self._writing:
            self._record = self._record.but(state="free" if self._record.lock else "revoked")
            try:
                if not self._is_lost():
                    self._board.write_lease(self._number, self._record.text())
            except (OSError, UserError) as error:
                _log.debug("%s: the lease is not released: %s", self._board, error)

    def _is_lost(self) -> bool:
        self._lost = self._lost or max(self._board.lease_numbers(), default=self._number) > self._number
        return self._lost


def holder_of(record: Record) -> str:
    """Return the holder of a lease for messages; that of one that is not held is not known."""
    return record.who if record.state == "held" else "another process"


def newest(board: Board) -> tuple[int, Record]:
    """Return number and content of the newest lease; 0 and a free one for a run that nobody has held."""
    number, text = _newest(board)
    return number, Record() if text is None else Record.of(text)


def _newest(board: Board) -> tuple[int, str | None]:
    numbers = board.lease_numbers()
    while numbers:
        text = board.read_lease(numbers[-1])
        if text is not None:
            return numbers[-1], text
        numbers = board.lease_numbers()  # a newer one has been created, and this one removed
    return 0, None


@contextmanager
def taken(board: Board, lock: str) -> Iterator[Lease]:
    """Hold a run while the body runs.

    Args:
        board: Where the run's leases are.
        lock: The name of the file `lock` that this process locks: no other process of this machine that
            locked the same file is alive. "" if it locks none.

    Raises:
        Held: Another process holds the run.
    """
    number, record = newest(board)
    if record.state == "held" and not _has_died(record, lock):
        raise Held(record.who)
    mine = Record(
        state="held",
        who=environment.this_process(),
        host=this_host(),
        lock=lock,
        life=life(),
        id=uuid4().hex,
    )
    if not board.create_lease(number + 1, mine.text()):
        raise Held(holder_of(newest(board)[1]))
    lease = Lease(board, number + 1, mine)
    _keeper.add(lease)
    try:
        numbers = board.lease_numbers()
        if numbers[-1:] != [number + 1]:
            # this process stood still before it created the number, which others had created and removed
            raise Held(holder_of(newest(board)[1]))
        for older in numbers[:-1]:
            board.remove_lease(older)
        yield lease
    finally:
        with signals.deferred():
            _keeper.remove(lease)
            lease.release()


def _has_died(record: Record, lock: str) -> bool:
    """Return whether a holder has died, because this process locks the file that it had locked."""
    return bool(lock) and record.lock == lock and record.host == this_host()


def is_free(board: Board, lock: str) -> bool:
    """Return whether a run is free, and revoke its lease if its holder gives no sign of life.

    Args:
        board: Where the run's leases are.
        lock: As in `taken`.
    """
    try:
        number, text = _newest(board)
    except (OSError, UserError):
        for key in [key for key in _seen if key[0] == str(board)]:
            del _seen[key]  # the silence of a store that gives no answer is not its holder's
        raise
    record = Record() if text is None else Record.of(text)
    if text is None or record.state != "held" or _has_died(record, lock):
        return True
    now, key = time.monotonic(), (str(board), number)
    before, since = _seen.get(key, (None, now))
    if before != text:
        _seen[key] = text, now
        return False
    if now - since <= record.life:
        return False
    _seen.pop(key)
    _log.warning("%s: %s gave no sign of life for %g s", board, record.who, record.life)
    return board.create_lease(number + 1, record.but(state="revoked").text())


class _Keeper:
    """Gives signs of life for the leases of this process, in a thread that ends with the last of them."""

    def __init__(self) -> None:
        self._leases: dict[Lease, Future[None] | None] = {}  # with the sign of life that is being written
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        with self._changing:
            self._leases[lease] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="leases", daemon=True)
                self._thread.start()

    def remove(self, lease: Lease) -> None:
        with self._changing:
            self._leases.pop(lease, None)

    def _keep(self) -> None:
        # several at a time, because a store may be slow, or give no answer to one request
        with ThreadPoolExecutor(_TOGETHER, "leases") as threads:
            while True:
                time.sleep(life() / _BEATS)
                with self._changing:
                    if not self._leases:
                        self._thread = None
                        return
                    for lease, beat in self._leases.items():
                        if beat is None or beat.done():
                            with suppress(RuntimeError):  # Python is ending
                                self._leases[lease] = threads.submit(lease.beat)


_keeper = _Keeper()
