"""huggingface.co and its mirrors."""

import difflib
from urllib.parse import urlencode

import httpx2
from huggingface_hub import HfApi, hf_hub_url, set_client_factory
from huggingface_hub.hf_api import RepoSibling

from configs.messages import _
from utils.download.errors import SourceError, TransientError
from utils.download.http import make_client
from utils.download.listing import Listing, RemoteFile
from utils.download.source import Source

MOST_NAMES = 10
"""In a message that lists what there is."""


class HuggingFaceSource(Source):
    """A repository at huggingface.co, or at a mirror that speaks its API."""

    def list_files(self, revision: str) -> Listing:
        # The hub library's own client waits for ever, and follows a list's next page to any host with the token.
        set_client_factory(lambda: make_client(self.token_home, self.timeout))
        with self.refusals():
            try:
                info = HfApi(endpoint=self.endpoint, token=self.token or False).repo_info(
                    self.repo_id,
                    repo_type=self.repo_type,
                    revision=revision,
                    timeout=self.timeout,
                    files_metadata=True,
                )
                files = {item.rfilename: _remote_file(item, info.sha) for item in info.siblings}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, OSError):  # a BadRequestError is a ValueError too
                    raise
                raise TransientError(_("{host} sent a list that makes no sense", host=self.name)) from error
        return Listing(info.sha, files)

    def url(self, file: RemoteFile) -> str:
        return hf_hub_url(
            self.repo_id, file.path, repo_type=self.repo_type, revision=file.commit, endpoint=self.endpoint
        )

    def list_like(self, pinned: Listing, revision: str) -> Listing:
        own = self.list_files(pinned.commit or revision)
        if pinned.commit not in ("", own.commit):
            raise SourceError(_("{host} has another revision; it is not used.", host=self.name))
        return own

    def check_answer(self, file: RemoteFile, headers: httpx2.Headers) -> None:
        commit = headers.get("X-Repo-Commit")
        if commit is None:
            return  # a mirror that does not say; the hash will tell
        digest = (headers.get("X-Linked-ETag") or headers.get("ETag") or file.digest).removeprefix("W/").strip('"')
        size = headers.get("X-Linked-Size", str(file.size))
        comparable = len(digest) == len(file.digest)
        if commit != file.commit or size != str(file.size) or (comparable and digest != file.digest):
            raise SourceError(
                _(
                    "{host} serves another revision of {file} than it listed. If the repository has just changed, run "
                    "the same command again to take its new revision.",
                    host=self.name,
                    file=file.path,
                )
            )

    def _nearest_names(self) -> list[str]:
        wanted = self.repo_id.rpartition("/")[2]
        query = urlencode({"search": wanted, "limit": 100})
        try:
            answer = self.client.get(f"{self.endpoint}/api/{self.repo_type}s?{query}", headers=self.headers)
            names = [item["id"] for item in answer.raise_for_status().json()]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return []  # only a hint: the message stands without it
        return difflib.get_close_matches(self.repo_id, names, n=3, cutoff=0.4)

    def _revisions(self) -> list[str]:
        try:
            api = HfApi(endpoint=self.endpoint, token=self.token or False)
            refs = api.list_repo_refs(self.repo_id, repo_type=self.repo_type)
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return []  # only a hint: the message stands without it
        return [ref.name for ref in refs.branches + refs.tags][:MOST_NAMES]


def _remote_file(item: RepoSibling, commit: str | None) -> RemoteFile:
    if commit is None or (item.lfs is None and (item.size is None or item.blob_id is None)):
        raise ValueError("a file without commit, size or hash")
    if item.lfs is not None:
        return RemoteFile(item.rfilename, item.lfs.size, "sha256", item.lfs.sha256, commit)
    return RemoteFile(item.rfilename, item.size, "git-sha1", item.blob_id, commit)
