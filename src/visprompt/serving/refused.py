"""The error of a request that is answered with a status and one sentence."""

from visprompt.errors import UserError


class Refused(UserError):
    """A request, or one image of it, that is answered with an error.

    Args:
        status: The HTTP status.
        message: One sentence for the client: what is wrong, and what to do.
        retry_after: Seconds after which the client may try again; None if it should not.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
