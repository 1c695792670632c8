"""Why a transfer stops: for a while, at this source, or for today."""


class TransientError(Exception):
    """Something that may pass by itself, such as a broken connection. The text says what happened.

    `retry_after` holds the seconds that the server asks for, if it does.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class SourceError(Exception):
    """A source that can't give what is asked of it, however often it is asked. The text is for the user."""
