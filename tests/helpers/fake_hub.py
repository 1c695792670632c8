"""A local server that speaks the hub's API and file routes as huggingface_hub sees them, and misbehaves by seed.

    python tests/helpers/fake_hub.py      # prints two addresses as one JSON line: the hub's, and its storage host's

A scenario, posted to /_scenario as JSON, lives under its own path: http://127.0.0.1:PORT/NAME is an endpoint like
https://huggingface.co. GET /NAME/_report tells what happened there. ModelScope's routes are served too.
"""

import hashlib
import json
import mmap
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request, urlopen

BODY_FAULTS = ("cut", "reset", "stall", "wrong_byte", "wrong_length", "whole_answer", "wrong_range")
STATUS_FAULTS = {"500": 500, "503": 503, "429": 429, "416": 416, "expired": 403}
LISTING_FAULTS = ("listing_500", "listing_garbage", "listing_cut")
BLOCK = 64 * 1024


def content(name: str, size: int, seed: int) -> bytes:
    """The bytes of a file: the same for the same name, size and seed. safetensors get a valid header."""
    data = random.Random(f"{name} {size} {seed}").randbytes(size)
    if not name.endswith(".safetensors"):
        return data
    filler = size - 8 - 80
    header = json.dumps({"weight": {"dtype": "U8", "shape": [filler], "data_offsets": [0, filler]}}).ljust(80)
    return struct.pack("<Q", len(header)) + header.encode() + data[:filler]


def mapped(path: str) -> mmap.mmap:
    """A large file's bytes, without reading them into memory."""
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def git_sha1(data: bytes) -> str:
    digest = hashlib.sha1(b"blob %d\0" % len(data))
    digest.update(data)
    return digest.hexdigest()


class Scenario:
    """One repository with its misbehaviour."""

    def __init__(self, values):
        self.name = values["name"]
        self.repo_id = values.get("repo_id", "owner/model")
        self.repo_type = values.get("repo_type", "model")
        self.seed = values.get("seed", 0)
        self.probability = values.get("probability", 0.0)
        """Of a fault, for each request."""
        self.kinds = values.get("kinds", [])
        self.faults_left = values.get("most_faults", 0)
        self.always = values.get("always", {})
        """path -> the fault that every request for it meets."""
        self.stall_seconds = values.get("stall_seconds", 2.0)
        self.retry_after = values.get("retry_after", "0")
        self.deny = values.get("deny", "")
        self.token = values.get("token", "")
        self.latency = values.get("latency", 0.0)
        self.rate = values.get("rate", 0)
        """Bytes a second for each connection; 0 = no limit."""
        self.moves_after = values.get("moves_after", 0)
        """After so many requests for files the branch points to a new commit, and the server serves only that."""
        self.random = random.Random(self.seed)
        self.lock = threading.Lock()
        self.faults = Counter()
        self.sent = Counter()
        self.requests = 0
        """For lists and files that were let through."""
        self.strayed_tokens = 0
        self.commits = []
        for age in range(2 if self.moves_after else 1):
            files = {
                path: mapped(file["file"]) if "file" in file else content(path, file["size"], self.seed + age)
                for path, file in values["files"].items()
            }
            is_lfs = {
                path: file.get("lfs", file.get("size", 1 << 30) > 10_000) for path, file in values["files"].items()
            }
            sha = hashlib.sha1(f"{self.repo_id} {self.seed} {age}".encode()).hexdigest()
            hashes = {path: (hashlib.sha256(data).hexdigest(), git_sha1(data)) for path, data in files.items()}
            self.commits.append((sha, files, is_lfs, hashes))
        self.listed = values.get("listed_names", {})
        """path -> the name under which it is listed (for dangerous names)."""

    def commit(self):
        return self.commits[-1 if self.moves_after and self.requests > self.moves_after else 0]

    def fault(self, path, possible):
        """The fault that this request meets, if any."""
        with self.lock:
            self.requests += 1
            kind = self.always.get(path)
            kinds = [kind for kind in self.kinds if kind in possible]
            if kind is None and kinds and self.faults_left > 0 and self.random.random() < self.probability:
                kind = self.random.choice(kinds)
                self.faults_left -= 1
            if kind is not None:
                self.faults[kind] += 1
            return kind

    def draw(self, limit):
        with self.lock:
            return self.random.randrange(max(1, limit))

    def count(self, path, size):
        with self.lock:
            self.sent[path] += size

    def report(self):
        with self.lock:
            return {
                "faults": dict(self.faults),
                "sent": dict(self.sent),
                "requests": self.requests,
                "strayed_tokens": self.strayed_tokens,
                "commit": self.commits[0][0],
            }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_arguments):
        pass

    def handle(self):
        try:
            super().handle()
        except (ConnectionError, ValueError):  # the client has gone, or we have cut the line ourselves
            self.close_connection = True

    def do_POST(self):
        values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.scenarios[values["name"]] = Scenario(values)
        self.answer(200, b"{}")

    def do_DELETE(self):
        self.server.scenarios.pop(self.path.strip("/"), None)
        self.answer(200, b"{}")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        name, _slash, rest = url.path.lstrip("/").partition("/")
        self.scenario = scenario = self.server.scenarios.get(name)
        if scenario is None:
            return self.answer(404, b"{}")
        if rest == "_report":
            return self.answer_json(scenario.report())
        time.sleep(scenario.latency)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if self.server.is_storage:
            return self.serve_storage(rest)
        return self.serve_hub(rest, query)

    def serve_hub(self, rest, query):
        scenario = self.scenario
        repo, modelscope = scenario.repo_id, f"api/v1/models/{scenario.repo_id}/repo"
        api = f"api/{scenario.repo_type}s"
        if rest == api:
            return self.answer_json([{"id": scenario.repo_id}, {"id": "someone/else"}])
        if rest == f"{api}/{repo}/refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": scenario.commits[0][0]}
            return self.answer_json({"branches": [branch], "tags": [], "converts": []})
        if scenario.deny:
            return self.refuse(scenario.deny)
        if scenario.token and self.headers.get("Authorization") != f"Bearer {scenario.token}":
            return self.refuse("401")
        if rest.startswith(f"{api}/{repo}/revision/") or rest == f"{api}/{repo}":
            return self.serve_listing(rest.rpartition("/")[2], with_tree=False)
        if rest.startswith(f"{api}/{repo}/tree/"):
            return self.serve_listing(rest.split("/")[5], with_tree=True)
        if rest == modelscope + "/files":
            return self.serve_modelscope_listing()
        if rest == modelscope:
            return self.serve_file(query["FilePath"], redirect=False)
        home = repo if scenario.repo_type == "model" else f"{scenario.repo_type}s/{repo}"
        if rest.startswith(f"{home}/resolve/"):
            _resolve, _revision, path = rest.removeprefix(f"{home}/").split("/", 2)
            return self.serve_file(unquote(path), redirect=True)
        return self.refuse("404")

    def refuse(self, kind):
        codes = {"gated": (403, "GatedRepo"), "404": (404, "RepoNotFound"), "revision": (404, "RevisionNotFound")}
        status, code = codes.get(kind, (int(kind) if kind.isdecimal() else 403, ""))
        return self.answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def serve_listing(self, revision, with_tree):
        scenario = self.scenario
        if kind := scenario.fault("", LISTING_FAULTS):
            return self.misbehave_in_listing(kind)
        sha, files, is_lfs, hashes = scenario.commit()
        if revision not in ("main", sha, scenario.repo_id.rpartition("/")[2]):
            return self.refuse("revision")
        tree, siblings = [], []
        for path, data in files.items():
            listed, (sha256, sha1) = scenario.listed.get(path, path), hashes[path]
            tree.append({"type": "file", "path": listed, "size": len(data), "oid": sha1})
            siblings.append({"rfilename": listed, "size": len(data), "blobId": sha1})
            if is_lfs[path]:
                tree[-1]["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
                siblings[-1]["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
        return self.answer_json(tree if with_tree else {"id": scenario.repo_id, "sha": sha, "siblings": siblings})

    def misbehave_in_listing(self, kind):
        if kind == "listing_500":
            return self.answer(500, b"busy")
        if kind == "listing_garbage":
            return self.answer(200, b"<html>please log in</html>")
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{")
        return self.hang_up(reset=False)

    def serve_modelscope_listing(self):
        sha, files, _is_lfs, hashes = self.scenario.commit()
        items = [
            {"Name": path, "Path": path, "Type": "blob", "Size": len(data), "Sha256": hashes[path][0], "Revision": sha}
            for path, data in files.items()
        ]
        return self.answer_json({"Code": 200, "Data": {"Files": items}, "Success": True})

    def serve_file(self, path, redirect):
        scenario = self.scenario
        sha, files, is_lfs, hashes = scenario.commit()
        if path not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        digest = hashes[path][0 if is_lfs[path] else 1]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if not redirect:
            headers = {}
        if not (redirect and is_lfs[path]):
            return self.serve_bytes(path, files[path], headers)
        headers |= {"X-Linked-Size": str(len(files[path])), "X-Linked-ETag": f'"{digest}"'}
        headers["Location"] = f"{self.server.storage}/{scenario.name}/{path}?signature=x"
        return self.answer(302, b"", headers)

    def serve_storage(self, path):
        scenario = self.scenario
        if self.headers.get("Authorization"):
            scenario.strayed_tokens += 1
        _sha, files, _is_lfs, _hashes = scenario.commit()
        return self.serve_bytes(unquote(path), files[unquote(path)], {"Accept-Ranges": "bytes"})

    def serve_bytes(self, path, data, headers):
        scenario = self.scenario
        possible = {*BODY_FAULTS, *STATUS_FAULTS} - (set() if self.server.is_storage else {"expired"})
        kind = scenario.fault(path, possible) if self.command == "GET" else None
        if kind in STATUS_FAULTS:
            return self.answer(STATUS_FAULTS[kind], b"", {"Retry-After": scenario.retry_after} if kind == "429" else {})
        start, end, status = 0, len(data), 200
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if wanted and kind != "whole_answer":
            first, _dash, last = wanted.partition("-")
            start, end, status = int(first), min(len(data), int(last) + 1 if last else len(data)), 206
            if start >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            shift = 1 if kind == "wrong_range" else 0
            headers = {**headers, "Content-Range": f"bytes {start + shift}-{end - 1}/{len(data)}"}
        length = end - start
        announced = length + scenario.draw(1000) + 1 if kind == "wrong_length" else length
        self.start_answer(status, {**headers, "Content-Length": str(announced)})
        if self.command == "HEAD":
            return None
        breaks_at = scenario.draw(length) if kind in BODY_FAULTS else length
        body = memoryview(data)[start:end]
        if kind in ("wrong_byte", "always_wrong") and length:
            body = bytearray(body)
            body[breaks_at if kind == "wrong_byte" else -1] ^= 0xFF
        self.send_body(path, memoryview(body)[: breaks_at if kind in ("cut", "reset", "stall") else length])
        if kind == "stall":
            select.select([self.connection], [], [], scenario.stall_seconds)
        if kind in ("cut", "reset", "stall", "wrong_length"):
            self.hang_up(reset=kind == "reset")
        return None

    def send_body(self, path, body):
        scenario = self.scenario
        if not scenario.rate:
            for position in range(0, len(body), 1 << 20):
                block = body[position : position + (1 << 20)]
                self.wfile.write(block)
                scenario.count(path, len(block))
            return
        began, step = time.monotonic(), max(1024, scenario.rate // 20)
        for position in range(0, len(body), step):
            block = body[position : position + step]
            self.wfile.write(block)
            scenario.count(path, len(block))
            time.sleep(max(0.0, began + (position + len(block)) / scenario.rate - time.monotonic()))

    def answer_json(self, value):
        return self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body, headers=()):
        self.start_answer(status, {**dict(headers), "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def start_answer(self, status, headers):
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def hang_up(self, reset):
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, scenarios, storage):
        super().__init__(("127.0.0.1", 0), Handler)
        self.scenarios = scenarios
        self.is_storage = storage is None
        self.storage = storage
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, _request, _client_address):
        if not isinstance(sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1], OSError):
            super().handle_error(_request, _client_address)


class FakeHub:
    """The server in a process of its own."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.address, self.storage = json.loads(self.process.stdout.readline())
        return self

    def __exit__(self, *_error):
        self.process.stdin.close()  # ends it, also when we are killed
        self.process.wait()
        self.process.stdout.close()

    def scenario(self, name, **values):
        """Set a scenario up; gives its endpoint."""
        body = json.dumps({"name": name, **values}).encode()
        with urlopen(Request(f"{self.address}/_scenario", body, method="POST")):
            return f"{self.address}/{name}"

    def report(self, endpoint):
        """What happened in a scenario."""
        with urlopen(f"{endpoint}/_report") as answer:
            return json.load(answer)

    def forget(self, endpoint):
        """Give a scenario's memory back."""
        with urlopen(Request(endpoint, method="DELETE")):
            pass


def main():
    scenarios = {}
    storage = Server(scenarios, None)
    hub = Server(scenarios, storage.address)
    for server in (storage, hub):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps([hub.address, storage.address]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
