"""An object store on this machine that speaks as much of S3 as reading takes."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

from tests.support.file_server import FileHandler


class BucketHandler(FileHandler):
    """S3's objects and its listing."""

    def do_GET(self):
        asked = urlsplit(self.path)
        query = parse_qs(asked.query)
        if "list-type" not in query:
            super().do_GET()
            return
        bucket, prefix = self.server.folder / asked.path.strip("/"), query["prefix"][0]
        files = [path for path in sorted(bucket.rglob("*")) if path.is_file()]
        keys = [(str(path.relative_to(bucket)), path.stat().st_size) for path in files]
        date = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        found = [(key, size) for key, size in keys if key.startswith(prefix)]
        rows = [f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size>{date}</Contents>" for key, size in found]
        head = f"<Name>{bucket.name}</Name><KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>"
        text = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{head}{"".join(rows)}</ListBucketResult>'
        self.send_data(text.encode(), kind="application/xml")

    def send_data(self, data, **options):
        date = ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        options["headers"] = (*options.get("headers", ()), date, ("ETag", '"0"'))
        super().send_data(data, **options)
