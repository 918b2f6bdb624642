"""Bring finished runs from object storage into local copies, for commands that read runs.

A copy is in `runs/` of the user's cache folder (see `files.cache_folder`). The next command that reads the
same runs brings only those that have changed since, and removes those that are gone.
"""

import hashlib
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from visprompt.errors import UserError
from visprompt.files import alone, cache_folder, explained
from visprompt.runs.object_store import SCHEME, ObjectStore, checked_url
from visprompt.runs.remote_run import DamagedRun, RemoteRun
from visprompt.runs.result import read_result
from visprompt.runs.results_store import etag_of, finished
from visprompt.runs.run_folder import RESULT

log = logging.getLogger(__name__)
_TOGETHER = 16  # runs that are brought at the same time


def bring(url: str, key: str, with_states: bool) -> Path:
    """Bring the finished runs below an address, or the one run that it names.

    Args:
        url: "s3://bucket/prefix", at any depth.
        key: The setting that has this value, for errors.
        with_states: Whether the tuned states are brought too.

    Returns:
        The folder of the copy, or the run's folder in it. A damaged run is left out, with a warning.

    Raises:
        UserError: There is no finished run, or the store cannot be read.
    """
    url = checked_url(url, key)
    store = ObjectStore(url, key)
    copies = _copies()
    folder = copies / url.removeprefix(SCHEME)
    try:
        with alone(copies / "lock", f"copying runs from {url}"):
            etags = store.etags()  # what another command brought until now is in it
            places = [""] if RESULT in etags else finished(etags)
            if not places:
                raise UserError(
                    f"{key}={url} holds no finished run: name a prefix that paths.results had, or a run's"
                )
            for result in [*folder.rglob(RESULT)]:
                place = "" if result.parent == folder else result.parent.relative_to(folder).as_posix()
                if place not in places:
                    shutil.rmtree(result.parent)
            newer = []
            for place in places:
                local = folder / place
                whole = etag_of(local / RESULT) == etags[f"{place}/{RESULT}".lstrip("/")]
                if not (whole and read_result(local, hashed=False, with_state=with_states)):
                    newer.append(RemoteRun(local, store.below(place) if place else store))
            with ThreadPoolExecutor(_TOGETHER) as threads:
                list(threads.map(partial(_bring, with_states=with_states), newer))
    except OSError as error:
        raise explained(error, cache_folder(), "VISPROMPT_CACHE") from error
    return folder


def _bring(run: RemoteRun, with_states: bool) -> None:
    try:
        run.pull_finished(with_states)
    except DamagedRun as error:
        log.warning("%s; it is left out", error)
        shutil.rmtree(run.folder, ignore_errors=True)


def has_states(folder: Path) -> bool:
    """Return whether the runs in a folder have their tuned states, which those of a copy may lack."""
    try:
        return not folder.resolve().is_relative_to((cache_folder() / "runs").resolve())
    except RuntimeError:  # there is no home, and so there is no copy
        return True


def _copies() -> Path:
    """Return the folder for copies from this server; servers may have buckets of the same name."""
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    try:
        return cache_folder() / "runs" / hashlib.sha256(server.encode()).hexdigest()[:12]
    except RuntimeError as error:
        raise UserError(f"there is no folder for copies of runs ({error}): set VISPROMPT_CACHE") from error
