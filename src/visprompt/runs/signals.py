"""Ending on SIGINT (Ctrl-C) and SIGTERM (schedulers).

Work is kept, one sentence says so, the exit code is 130 or 143.

An entry point calls `install` before all other imports, which take seconds. The first signal raises `Ended`
in the main thread, so that `with` and `finally` blocks remove temporary files, release locks and end child
processes; while the first imports run there is nothing to tidy, and the process ends at once. A second signal
ends the process at once, too, and so does a cleanup that takes longer than `_PATIENCE`.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

# in the environment of a rank that `launch.run_ranks` started; that one's parent speaks
PARENT = "VISPROMPT_PARENT"
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_SAME = (
    0.5  # seconds in which a second signal is the first one again: `timeout` and torchrun send theirs twice
)
_PATIENCE = 20.0  # seconds for cleaning up: Kubernetes and SLURM kill after 30


class Ended(SystemExit):
    """The process is to end; its code is 128 and the signal's number.

    Being no `Exception`, libraries let it pass.
    """


_received: int | None = None
_since = 0.0
_started = False
_said = False
_raised = False
_again = False
_deferrals = 0


def install() -> None:
    """Handle SIGINT and SIGTERM where nobody else does (a background shell ignores SIGINT, submitit has its own)."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _WORDS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, handle)
    if sys.unraisablehook is not _unraisable:
        sys.unraisablehook = _unraisable
        atexit.register(_say)
        os.register_at_fork(after_in_child=_restore)


def started() -> None:
    """Say that there may be something to tidy up from here on, also while a module is imported."""
    global _started
    _started = True


def check() -> None:
    """Raise `Ended` where a signal came: a library may have swallowed the first."""
    if _received is not None:
        _raise()


@contextmanager
def consequences() -> Iterator[None]:
    """Raise `Ended` in place of any error that comes after a signal.

    A rank that is gone, a loader without workers.
    """
    try:
        yield
    except Exception:  # whatever a library makes of it
        check()
        raise


def is_terminated() -> bool:
    """Return whether SIGTERM came: a scheduler may start the same command again."""
    return _received == signal.SIGTERM


def sentence(number: int) -> str:
    """Return what is said of a signal."""
    return f"{_WORDS[signal.Signals(number)]}: run the same command again to go on where it stopped"


@contextmanager
def deferred() -> Iterator[None]:
    """Let a short piece of work finish first: a signal is raised at its end."""
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
        if _received is not None and not _raised and not _deferrals:
            _raise()


def handle(number: int, frame: FrameType | None) -> None:
    """Is the handler of both signals.

    Raises:
        Ended: On the first signal, where there may be something to tidy up.
    """
    global _received, _since, _again
    if _again:
        _again = False
        _raise()
    if _received is not None:
        if time.monotonic() - _since > _SAME:
            _quit()
        return
    _received, _since = number, time.monotonic()
    patience = threading.Timer(_PATIENCE, _quit)
    patience.daemon = True
    patience.start()
    if not _started and _importing(frame):
        atexit._run_exitfuncs()  # libraries make folders for temporary files as they are imported
        _quit()
    if not _deferrals:
        _raise()


def _raise() -> NoReturn:
    global _raised
    _raised = True
    assert _received is not None
    raise Ended(128 + _received)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _say() -> None:
    """Print the sentence, once, where a signal came; only the first rank of a run speaks."""
    global _said
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID"))
    if _received is None or _said or PARENT in os.environ or any(rank != "0" for rank in ranks):
        return
    _said = True
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # a closed pipe; a signal in the middle of a write
            stream.flush()
    start = "\n" if os.isatty(2) else ""  # a terminal's line begins with ^C
    with suppress(OSError):
        os.write(2, f"{start}{sentence(_received)}\n".encode())


def _quit() -> NoReturn:
    """End the process without cleaning up."""
    assert _received is not None
    _say()
    os._exit(128 + _received)


def _unraisable(unraisable: Any) -> None:
    """Raise `Ended` again that came where Python drops exceptions.

    In a finaliser, or in a callback of the exit.
    """
    if not isinstance(unraisable.exc_value, Ended):
        sys.__unraisablehook__(unraisable)
        return
    if sys._getframe().f_back is None:  # the interpreter itself called: it is ending
        _quit()
    timer = threading.Timer(0.05, _deliver_again)
    timer.daemon = True
    timer.start()


def _deliver_again() -> None:
    global _again
    _again = True
    assert _received is not None
    os.kill(os.getpid(), _received)


def _restore() -> None:
    """Give a forked child, such as a loader's worker, Python's own handlers back: its parent cleans up."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is handle:
            signal.signal(number, default)
