"""The part of the Hugging Face hub's interface that reading by range and uploading a folder use, over one folder."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from urllib.parse import unquote

from tests.support.file_server import FileHandler

SHA = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(FileHandler):
    """Repositories are folders ``USER/NAME`` of the server's folder; there is one revision."""

    def locate(self) -> Path:
        found = re.fullmatch(rf"/([\w.-]+/[\w.-]+)/resolve/(?:main|{SHA})/(.+)", unquote(self.path))
        return self.server.folder / found[1] / found[2] if found else self.server.folder / "none"

    def do_GET(self):
        model = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/\w+)?(?:\?.*)?", self.path)
        tree = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/\w+(?:\?.*)?", self.path)
        if model:
            self._answer({"id": model[1], "sha": SHA, "siblings": []}, model[1])
        elif tree:
            entries = sorted((self.server.folder / tree[1]).iterdir())
            kind = {"type": "file", "oid": SHA}
            self._answer([{**kind, "path": path.name, "size": path.stat().st_size} for path in entries], tree[1])
        elif self.path.startswith("/api/"):
            self._answer({}, "")
        else:
            super().do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        action = self.path.partition("?")[0].rpartition("/models/")[2]
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = asked.get("organization", "me") + "/" + asked["name"]
            (self.server.folder / name).mkdir(parents=True, exist_ok=True)
            shown = asked.get("visibility") or ("private" if asked.get("private") else "public")
            (self.server.folder / name / ".visibility").write_text(shown)
            self._answer({"url": f"{self.server.address}/{name}", "name": name, "id": name}, name)
        elif action.endswith("/preupload/main"):
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            self._answer(
                {"files": [{**one, "shouldIgnore": False} for one in files]}, action.removesuffix("/preupload/main")
            )
        elif action.endswith("/commit/main"):
            name = action.removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    path = self.server.folder / name / line["value"]["path"]
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{self.server.address}/{name}/commit/{SHA}"
            self._answer({"success": True, "commitOid": SHA, "commitUrl": url, "hookOutput": ""}, name)
        else:
            self._answer({"errors": [], "warnings": []}, "")

    def _answer(self, value: object, repository: str):
        if not (self.server.folder / repository).is_dir():
            headers = (("X-Error-Code", "RepoNotFound"), ("X-Error-Message", "Repository not found"))
            self.send_data(b"{}", status=404, kind="application/json", headers=headers)
            return
        self.send_data(json.dumps(value).encode(), kind="application/json")
