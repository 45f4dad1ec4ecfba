"""Teachers behind ``s3://`` and ``hf://``, and ``export --push``: the stores' own clients, servers of this machine.

Each command is a process of its own, as the clients read their endpoints when they are imported.
"""

import os
import subprocess
import sys

import pytest

from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.cli.main import main
from tests.support.bucket_server import BucketHandler
from tests.support.checkpoints import llama, random_arrays, write_checkpoint
from tests.support.file_server import serving
from tests.support.hub_server import HubHandler

pytestmark = pytest.mark.slow
CONFIG = llama(num_layers=8, hidden_size=64, head_dim=8, ffn_size=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores")
    teacher = write_checkpoint(path / "me" / "teacher", CONFIG, random_arrays(CONFIG), "hf", max_shard_bytes=400_000)
    (teacher / "tokenizer.json").write_text("{}")
    return path


def run(server, *words):
    """Runs a command whose stores are all this server."""
    stores = {"AWS_ENDPOINT_URL": server.address, "HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0"}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    more = {"HF_TOKEN": "hf_x", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "megatron_inherit", *map(str, words)]
    variables = {**os.environ, **stores, **keys, **more, "HF_HOME": str(server.folder / "home")}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("scheme", "handler"), [("s3", BucketHandler), ("hf", HubHandler)])
class TestTeachers:
    def test_only_the_selected_bytes_are_fetched(self, folder, tmp_path, scheme, handler):
        with serving(folder, handler) as server:
            done = run(server, "inherit", f"{scheme}://me/teacher", tmp_path / "remote", "--layers", "first:2")
            assert done.returncode == 0, done.stderr
            sent = server.sent
        assert main(["inherit", str(folder / "me" / "teacher"), str(tmp_path / "local"), "--layers", "first:2"]) == 0
        assert main(["verify", str(tmp_path / "remote"), str(tmp_path / "local")]) == 0
        with open_source(tmp_path / "local") as source:
            selected = sum(stored.nbytes for stored in source.tensors.values())
        headers = 20_000
        assert selected <= sent <= 1.02 * selected + headers
        assert (tmp_path / "remote" / "tokenizer.json").read_text() == "{}"

    def test_dropped_connections_are_taken_up_again(self, folder, tmp_path, scheme, handler):
        with serving(folder, handler) as server:
            server.drop_every = 7
            done = run(server, "inherit", f"{scheme}://me/teacher", tmp_path / "remote", "--layers", "5")
            assert done.returncode == 0, done.stderr
            assert server.dropped > 1
        assert main(["verify", str(folder / "me" / "teacher"), str(tmp_path / "remote")]) == 0

    def test_what_is_not_there_is_an_error(self, folder, tmp_path, scheme, handler):
        with serving(folder, handler) as server:
            done = run(server, "inherit", f"{scheme}://me/nobody", tmp_path / "remote", "--layers", "0")
        assert done.returncode == 5, done.stderr
        assert "config.json is missing" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())


def test_an_upload_that_fails_says_that_the_folder_is_whole(folder, tmp_path):
    with serving(tmp_path, HubHandler) as server:
        server.shutdown()
        server.server_close()
        done = run(server, "export", folder / "me" / "teacher", tmp_path / "out", "--push", "--repo", "them/student")
    assert done.returncode == 5, done.stderr
    assert "out is complete, but was not uploaded" in done.stderr
    assert "hf upload them/student" in done.stderr
    assert "Traceback" not in done.stderr
    assert main(["verify", str(folder / "me" / "teacher"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("words", "visibility"), [([], "private"), (["--public"], "public")])
def test_export_pushes_the_folder(folder, tmp_path, words, visibility):
    with serving(tmp_path / "hub", HubHandler) as server:
        (tmp_path / "hub").mkdir()
        teacher, out = folder / "me" / "teacher", tmp_path / "exported"
        done = run(server, "export", teacher, out, "--push", "--repo", "them/student", *words)
        assert done.returncode == 0, done.stderr
    pushed = tmp_path / "hub" / "them" / "student"
    assert (pushed / ".visibility").read_text() == visibility
    assert {path.name for path in pushed.iterdir()} - {".visibility", ".gitattributes"} == {
        p.name for p in out.iterdir()
    }
    for path in out.iterdir():
        assert (pushed / path.name).read_bytes() == path.read_bytes()
    assert main(["verify", str(teacher), str(pushed)]) == 0
