"""A Hub on loopback that keeps what is committed to it, and gives it back; only what huggingface_hub asks for."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = 10_000  # bytes from which a file is uploaded beside the commit
COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Repositories by name and branch, each a mapping of file names to bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private, self.large, self.messages, self.validated = {}, {}, {}, [], []
        self.refuses = False

    def handle_error(self, *_):
        """A client that hangs up is no fault of the Hub."""

    @property
    def url(self):
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The few addresses of the Hub that are asked for."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        """Create, check, and commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            return self._answer({"error": "You have no right to write here"}, status=403)
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            settings = json.loads(body)
            name = "/".join(filter(None, [settings.get("organization"), settings["name"]]))
            self.server.repositories.setdefault(name, {"main": {}})
            self.server.private[name] = settings.get("visibility") == "private" or settings.get("private", False)
            return self._answer({"url": f"{self.server.url}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            self.server.validated.append(json.loads(body)["content"])
            return self._answer({"errors": [], "warnings": []})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._answer({"objects": [self._place(item) for item in json.loads(body)["objects"]]})
        repository = self.server.repositories["/".join(parts[2:4])]
        branch = "main" if parts[-1] == parts[3] else parts[-1]
        if parts[4] == "branch":
            repository[branch] = {}
            return self._answer({})
        if parts[4] == "preupload":
            return self._answer({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        for line in body.splitlines():
            self._commit(repository[branch], json.loads(line))
        url = f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
        return self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _place(self, item):
        upload = {"href": f"{self.server.url}/large/{item['oid']}", "header": {}}
        return {**item, "actions": {"upload": upload}}

    def _mode(self, file):
        return {"path": file["path"], "uploadMode": "lfs" if file["size"] > LARGE else "regular", "shouldIgnore": False}

    def _commit(self, files, line):
        value = line["value"]
        if line["key"] == "header":
            self.server.messages.append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = self.server.large[value["oid"]]

    def do_PUT(self):
        """Take a large file."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == self.path.split("/")[-1]
        self.server.large[self.path.split("/")[-1]] = body
        self._answer({})

    def do_GET(self):
        """List a repository, or give a file."""
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            files = self.server.repositories["/".join(parts[2:4])]["main"]
            if "tree" in parts:
                entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in files]
                return self._answer(entries)
            siblings = [{"rfilename": name} for name in files]
            return self._answer({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings})
        return self._file("/".join(parts[:2]), "/".join(parts[4:]))

    do_HEAD = do_GET

    def _file(self, repository, name):
        content = self.server.repositories[repository]["main"].get(name)
        if content is None:
            return self._answer({}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self._send(content, 200, headers)

    def _answer(self, content, status=200, headers=None):
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content, status, headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def running_hub():
    """Serve until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
