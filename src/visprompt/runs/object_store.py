"""Read and write objects below a prefix of an S3 bucket, with conditional writes.

s3fs (the extra `s3`) is imported when the first object is asked for. Endpoint, region and credentials come
from the variables and files of AWS's own tools (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ~/.aws/config).
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from visprompt.errors import UserError, in_one_line
from visprompt.files import file_sha256

SCHEME = "s3://"
_CONNECT, _READ, _CHECK = 3, 10, 14  # seconds that are waited for a connection, an answer, the first answer
_ATTEMPTS = 3  # of a request that fails for a moment; botocore waits between them
_CONFLICTS = 5  # tries of a conditional write while another process writes the same object


@dataclass(frozen=True)
class Head:
    """What the store says of an object.

    Attributes:
        etag: Changes whenever the object does; the MD5 of the content where the store does not encrypt.
        facts: What the writer told of it, by name; always with `sha256`.
    """

    etag: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class ObjectStore:
    """The objects below a prefix; keys are relative to it.

    Attributes:
        url: "s3://bucket/prefix", without a slash at its end.
        key: The setting that names the store, for errors.
    """

    url: str
    key: str = "paths.results"

    def below(self, part: str) -> "ObjectStore":
        """Return the objects below a longer prefix."""
        return ObjectStore(f"{self.url}/{part}", self.key)

    def head(self, key: str) -> Head | None:
        """Return what the store says of an object, or None if there is no such object."""
        bucket, path = self._place(key)
        with self._files() as files:
            try:
                answer = files.call_s3("head_object", Bucket=bucket, Key=path)
            except FileNotFoundError:
                return None
        return Head(answer["ETag"].strip('"'), answer.get("Metadata", {}))

    def read(self, key: str) -> bytes | None:
        """Return an object's content, or None if there is no such object."""
        with self._files() as files:
            try:
                content: bytes = files.cat_file(f"{self.url}/{key}")
            except FileNotFoundError:
                return None
        return content

    def write(self, key: str, content: bytes) -> None:
        """Write a small object, whether it exists or not."""
        with self._files() as files:
            files.pipe_file(f"{self.url}/{key}", content)

    def write_if(self, key: str, content: bytes, etag: str | None) -> bool:
        """Write a small object on a condition that the store checks in the same step.

        Args:
            key: The object.
            content: Its content. It should be no other writer's: a request that is repeated because its
                answer was lost is refused, and is recognised by the content that is then in the store.
            etag: The object is replaced if it still has this ETag; None: it is only created.

        Returns:
            Whether the object now has this content.
        """
        condition = {"mode": "create"} if etag is None else {"IfMatch": etag}
        for again in range(_CONFLICTS):
            time.sleep(0.2 * again)
            with self._files() as files:
                try:
                    files.pipe_file(f"{self.url}/{key}", content, **condition)
                    return True
                except OSError as error:
                    status = _status(error)
                    if status not in (404, 409, 412):
                        raise
                    if status == 404 and etag is None:  # there is no such bucket
                        raise
            if status != 409:  # 409: another write of this object has not ended
                break
        return self.read(key) == content

    def upload(self, key: str, file: Path, **facts: str) -> None:
        """Write a file of any size as one object, which appears when it is complete.

        Args:
            key: The object.
            file: The file.
            **facts: Stored with the object, for `head`.
        """
        metadata = facts | {"sha256": file_sha256(file)}
        with self._files() as files:
            files.put_file(str(file), f"{self.url}/{key}", Metadata=metadata)

    def download(self, key: str, file: Path) -> bool:
        """Write an object to a file; return whether there is such an object."""
        with self._files() as files:
            try:
                files.get_file(f"{self.url}/{key}", str(file))
            except FileNotFoundError:
                return False
        return True

    def etags(self, start: str = "") -> dict[str, str]:
        """List all objects, at any depth, whose keys begin with some text; return their ETags by key."""
        folder, _, prefix = start.rpartition("/")
        place = f"{self.url}/{folder}".rstrip("/")
        with self._files() as files:
            found = files.find(place, prefix=prefix, detail=True)
        skipped = len(self.url.removeprefix(SCHEME)) + 1
        return {name[skipped:]: entry["ETag"].strip('"') for name, entry in found.items()}

    def remove(self, *keys: str) -> None:
        """Remove objects; those that are gone are left out."""
        for key in keys:
            bucket, path = self._place(key)
            with self._files() as files:
                files.call_s3("delete_object", Bucket=bucket, Key=path)

    def check(self) -> None:
        """Check that objects can be written here, and only on a condition where one is set.

        Raises:
            UserError: There is no such bucket, no credentials, no answer, or no permission to write; or the
                store replaces an object that was to be created only.
        """
        with self._files() as files:
            files.call_s3("head_bucket", Bucket=self._place("")[0], timeout=_CHECK)
        key = f"check-{uuid4().hex}"
        self.write_if(key, b"first", None)
        replaced = self.write_if(key, b"second", None)
        self.remove(key)
        if replaced:
            raise UserError(
                f"{self.key}={self.url} cannot be used: the store replaces an object although the request "
                "forbids it (If-None-Match), so two machines could take the same run; choose a store with "
                "conditional writes"
            )

    def _place(self, key: str) -> tuple[str, str]:
        bucket, _, prefix = self.url.removeprefix(SCHEME).partition("/")
        return bucket, f"{prefix}/{key}".lstrip("/")

    @contextmanager
    def _files(self) -> Iterator[Any]:
        """Yield the file system; raise what goes wrong in the store as one sentence that says what to do."""
        files = _file_system(os.getpid())
        from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

        try:
            yield files
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise self._refused(
                "no credentials were found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        except PermissionError as error:
            raise self._refused(
                f"the store refuses access ({in_one_line(error)})", "give credentials that may read and write"
            ) from error
        except FileNotFoundError as error:
            bucket = self._place("")[0]
            raise self._refused(f"there is no bucket {bucket}", "make it, or name another") from error
        except (OSError, BotoCoreError) as error:
            raise self._refused(
                f"the store gives no answer or a wrong one ({in_one_line(error) or type(error).__name__})",
                "check the network and AWS_ENDPOINT_URL, and run the same command again",
            ) from error

    def _refused(self, what: str, advice: str) -> UserError:
        return UserError(f"{self.key}={self.url} cannot be used: {what}; {advice}")


def checked_url(url: str, key: str = "paths.results") -> str:
    """Return the address of a store without slashes at its end.

    Args:
        url: The address.
        key: The setting that names it, for errors.

    Raises:
        UserError: It is not "s3://bucket" or "s3://bucket/prefix".
    """
    if "://" not in url:
        raise UserError(
            f"{key}={url} is not on object storage: give s3://BUCKET/PREFIX; for a folder that "
            f"machines share give paths.log_dir={url} instead"
        )
    if not url.startswith(SCHEME):
        scheme = url.partition("://")[0]
        raise UserError(f"{key}={url} cannot be read: of stores only s3:// is known, not {scheme}://")
    url = SCHEME + "/".join(filter(None, url.removeprefix(SCHEME).split("/")))
    if url == SCHEME:
        raise UserError(f"{key}=s3:// names no bucket: give s3://BUCKET/PREFIX")
    return url


def _status(error: BaseException) -> int | None:
    """Return the HTTP status for which s3fs raised an error, or None if there was no answer."""
    answer = getattr(error.__cause__, "response", None) or {}
    status: int | None = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


@lru_cache(maxsize=1)
def _file_system(process: int) -> Any:
    """Return s3fs's file system; a forked process makes its own.

    Args:
        process: This process's id.

    Raises:
        UserError: s3fs is not installed.
    """
    try:
        import s3fs
    except ImportError as error:
        raise UserError("runs on object storage need s3fs: pip install '.[s3]'") from error
    for name in ("botocore", "aiobotocore"):  # they say where they found the credentials
        logging.getLogger(name).setLevel(logging.WARNING)
    config = {
        "connect_timeout": _CONNECT,
        "read_timeout": _READ,
        "retries": {"total_max_attempts": _ATTEMPTS, "mode": "standard"},
    }
    # a listing of a moment ago would hide what other machines have written since
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    files.retries = 2  # readings of a body that breaks off; botocore repeats requests only
    return files
