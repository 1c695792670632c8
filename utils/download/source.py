"""What every place that files come from has in common.

A source lists a repository at one commit and says how to ask for a file of it. It knows which host its token is for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import close_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from configs.messages import _
from utils.download.errors import SourceError
from utils.download.http import Origin, check_passing, host_name, make_client, origin, sorted_errors
from utils.download.listing import Listing, RemoteFile

HUGGINGFACE = "https://huggingface.co"


class Source(ABC):
    """One host that has the repository."""

    def __init__(self, endpoint: str, repo_id: str, repo_type: str, token: str | None, timeout: float) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.name = host_name(endpoint)
        self.repo_id, self.repo_type = repo_id, repo_type
        self.token, self.timeout = token, timeout
        self.client = make_client(self.token_home, timeout)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        close_session()  # the hub library's own

    @property
    def token_home(self) -> dict[Origin, str]:
        """The one origin that the token may be sent to."""
        return {origin(self.endpoint): self.token} if self.token else {}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request to the source itself."""
        return build_hf_headers(token=self.token or False, library_name="llama2-chinese")

    @abstractmethod
    def list_files(self, revision: str) -> Listing:
        """The repository's files at a branch, tag or commit.

        Raises:
            TransientError: the source doesn't answer now.
            SourceError: it has no such repository or revision, or doesn't let us in.
        """

    @abstractmethod
    def url(self, file: RemoteFile) -> str:
        """The address of a file."""

    @abstractmethod
    def list_like(self, pinned: Listing, revision: str) -> Listing:
        """List what another source pinned when it was asked for `revision`.

        Raises:
            TransientError: the source doesn't answer now.
            SourceError: it does not have the pinned revision.
        """

    @abstractmethod
    def check_answer(self, file: RemoteFile, headers: httpx2.Headers) -> None:
        """Compare what the source says that it serves with what was asked for.

        Raises:
            SourceError: it is another revision or another file.
        """

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn the refusals of a hub into messages for the user.

        Raises:
            SourceError: the source said no and will say so again.
            TransientError: it may say yes a little later.
        """
        try:
            with sorted_errors(self.endpoint, self.timeout):
                yield
        except GatedRepoError as error:
            raise SourceError(self._gated_message()) from error
        except RevisionNotFoundError as error:
            message = _("{host} has no such revision of {repo_id}.", host=self.name, repo_id=self.repo_id)
            names = self._revisions()
            raise SourceError(
                message + (" " + _("It has: {names}", names=", ".join(names)) if names else "")
            ) from error
        except RemoteEntryNotFoundError as error:
            raise SourceError(
                _(
                    "{host} no longer has a file that it listed. If the repository has just changed, run the same "
                    "command again to take its new revision.",
                    host=self.name,
                )
            ) from error
        except RepositoryNotFoundError as error:
            raise SourceError(self._not_found_message(error.response.status_code)) from error
        except HfHubHTTPError as error:
            check_passing(error.response)
            status = error.response.status_code
            if status in (401, 403, 404):
                raise SourceError(self._not_found_message(status)) from error
            raise SourceError(
                _(
                    "{host} answers {status}: {message}",
                    host=self.name,
                    status=status,
                    message=error.server_message or "",
                )
            ) from error

    def _gated_message(self) -> str:
        return _(
            "{repo_id} is a gated repository: its owner wants to be asked. In a browser open {page}, sign in and "
            "accept the terms; make a token (read) at {tokens} and pass it as --token, or run `hf auth login`.",
            repo_id=self.repo_id,
            page=f"{HUGGINGFACE}/{'' if self.repo_type == 'model' else self.repo_type + 's/'}{self.repo_id}",
            tokens=f"{HUGGINGFACE}/settings/tokens",
        )

    def _not_found_message(self, status: int) -> str:
        if status == 404:
            message = _(
                "{host} has no {repo_type} {repo_id}.", host=self.name, repo_type=self.repo_type, repo_id=self.repo_id
            )
            near = self._nearest_names()
            return message + (" " + _("Did you mean: {names}?", names=", ".join(near)) if near else "")
        if self.token:
            return _(
                "{host} does not let this token into {repo_id} ({status}). Is the token valid, may it read this "
                "repository, and is the name right?",
                host=self.name,
                repo_id=self.repo_id,
                status=status,
            )
        return _(
            "{host} wants a token for {repo_id} ({status}): the repository is private, or there is none of that name. "
            "Check the name, or pass --token (or run `hf auth login`).",
            host=self.name,
            repo_id=self.repo_id,
            status=status,
        )

    def _nearest_names(self) -> list[str]:
        """Names of repositories like the one that is not there; none where the source offers no search."""
        return []

    def _revisions(self) -> list[str]:
        """Branches and tags of the repository; none where the source does not tell."""
        return []
