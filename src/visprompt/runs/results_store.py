"""Open the store of a command's runs: object storage that many machines share.

`paths.results=s3://bucket/prefix` names the store, and `paths.log_dir` stays the local working folder of each
machine: the run in `<log_dir>/<task>/<method>/<hash>` is stored below `<prefix>/<task>/<method>/<hash>/`.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path

from visprompt.files import temporary_folder
from visprompt.runs.job import Paths
from visprompt.runs.object_store import ObjectStore, checked_url
from visprompt.runs.remote_run import RemoteRun
from visprompt.runs.result import Result, read_result
from visprompt.runs.run_folder import RESULT

_TOGETHER = 8  # runs that are brought at the same time


@dataclass(frozen=True)
class Results:
    """The store of a command's runs.

    Attributes:
        objects: All objects of the store.
        log_dir: The local working folder.
    """

    objects: ObjectStore
    log_dir: Path

    @classmethod
    def of(cls, paths: Paths) -> "Results | None":
        """Return the store that `paths.results` names, or None if it is null.

        Raises:
            UserError: It is not the address of a store.
        """
        return cls(ObjectStore(checked_url(paths.results)), Path(paths.log_dir)) if paths.results else None

    def run(self, folder: Path) -> RemoteRun:
        """Return the run of a local folder, or what the store has for any other folder below `log_dir`."""
        part = folder.absolute().relative_to(self.log_dir.absolute()).as_posix()
        return RemoteRun(folder, self.objects.below(part))

    def of_group(self, parent: Path) -> list[tuple[str, Result]]:
        """Read the results of all finished runs of a task and a method, without their files.

        Args:
            parent: `<log_dir>/<task>/<method>`.

        Returns:
            The names of the runs' folders, and their results; damaged ones are left out.
        """
        objects = self.run(parent).objects
        etags = objects.etags()
        names = [name for name in finished(etags) if "/" not in name]

        def read(name: str) -> Result | None:
            if etags[f"{name}/{RESULT}"] == etag_of(parent / name / RESULT):
                return read_result(parent / name, with_state=False)
            content = objects.read(f"{name}/{RESULT}")
            with temporary_folder("result") as folder:
                (folder / RESULT).write_bytes(content or b"")
                return read_result(folder, with_state=False)

        with ThreadPoolExecutor(_TOGETHER) as threads:
            results = list(threads.map(read, names))
        return [(name, result) for name, result in zip(names, results, strict=True) if result]

    def check(self) -> None:
        """Check that the store can be used, see `ObjectStore.check`."""
        self.objects.check()


def finished(keys: Iterable[str]) -> list[str]:
    """Return the places of finished runs among the keys of a store: "dtd/linear/0123456789ab"."""
    places = [key.removesuffix(f"/{RESULT}") for key in keys if key.endswith(f"/{RESULT}")]
    # a key may hold anything, such as a step to the folder above
    return [place for place in places if not {"", ".", ".."} & {*place.split("/")}]


def etag_of(file: Path) -> str | None:
    """Return the ETag that a store without encryption gives a small file; None if the file cannot be read."""
    try:
        return md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError:
        return None
