"""The commands around the planner: dry runs, JSON, export, the doors for Megatron users, zero copy."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.formats import dcp_metadata, native, torch_dist
from megatron_inherit.cli.main import main
from tests.support.checkpoints import assert_equal, llama, random_arrays, read_arrays, write_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(llama())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, arrays):
    folder = write_checkpoint(tmp_path_factory.mktemp("t") / "teacher", llama(), arrays, "hf")
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n# A teacher\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_dry_run_writes_nothing_and_predicts_the_bytes(teacher, tmp_path, capsys):
    words = ["inherit", str(teacher), str(tmp_path / "s"), "--layers", "2,0", "--reset", "embed"]
    assert main([*words, "--dry-run", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert main([*words, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["plan"] == predicted["plan"]
    size = (tmp_path / "s" / "model.safetensors").stat().st_size
    assert done["files"] == predicted["files"] == {"model.safetensors": size}
    assert predicted["fresh"] == ["embed.weight"]
    assert done["bytes_read"] >= predicted["bytes_to_read"]


def test_every_output_tells_how_it_was_made(teacher, tmp_path):
    assert main(["inherit", str(teacher), str(tmp_path / "s"), "--layers", "0", "--hash-teacher", "--seed", "4"]) == 0
    record = json.loads((tmp_path / "s" / "inherit.json").read_text())
    assert record["seed"] == 4
    assert set(record["plan"]["origin"]["identity"]) == {"config.json", "model.safetensors"}
    assert [Path(name).name for name in record["teacher_files"]] == ["model.safetensors"]
    assert json.loads((tmp_path / "s" / "environment.json").read_text())["versions"]["numpy"] == np.__version__
    card = (tmp_path / "s" / "README.md").read_text()
    assert "license: openrail" in card
    assert "1 block out of the 4 of teacher: 0" in card


def test_a_card_says_what_is_known_of_the_licence(teacher, tmp_path):
    assert main(["inherit", str(teacher), str(tmp_path / "s"), "--layers", "0"]) == 0
    assert "The teacher's licence (openrail) holds for this model too." in (tmp_path / "s" / "README.md").read_text()
    (tmp_path / "s" / "README.md").unlink()
    assert main(["inherit", str(tmp_path / "s"), str(tmp_path / "t"), "--layers", "0"]) == 0
    assert "The licence of the teacher, whose folder names none, holds" in (tmp_path / "t" / "README.md").read_text()


def test_as_published_says_so(teacher, tmp_path, capsys):
    assert main(["inherit", str(teacher), str(tmp_path / "s"), "--layers", "first:2", "--as-published"]) == 0
    assert "as in the released Inheritune scripts" in capsys.readouterr().out
    assert json.loads((tmp_path / "s" / "inherit.json").read_text())["as_published"] is True
    with open_source(tmp_path / "s") as student, open_source(teacher) as source:
        assert student.read("head.weight").data.tobytes() == source.read("head.weight").data.tobytes()
        assert student.read("embed.weight").data.tobytes() != source.read("embed.weight").data.tobytes()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, arrays):
    """A run of two saved steps, the newer one of a rank-split model."""
    folder = tmp_path_factory.mktemp("run")
    for step, factor in ((10, 2), (20, 1)):
        path = folder / "checkpoints" / f"step_{step:08d}"
        path.mkdir(parents=True)
        for rank in range(2):
            native.write_rank(path, rank, list(_parts(arrays, rank, factor)), step=step)
        state = {"model": llama().to_json(), "licence": "openrail"}
        (path / "state.json").write_text(json.dumps(state))
        (path / "side").mkdir()
        (path / "side" / "tokenizer.json").write_text("{}")
        native.write_manifest(path, world_size=2, facts={"step": step})
    return folder


def _parts(arrays, rank, factor):
    for name, values in arrays.items():
        rows = len(values) // 2
        part = np.ascontiguousarray(values[rank * rows : (rank + 1) * rows] * np.float32(factor))
        yield native.StoredPart(
            name=name,
            kind="weight",
            global_shape=values.shape,
            start=(rank * rows, *(0,) * (values.ndim - 1)),
            shape=part.shape,
            flat=None,
            dtype="F32",
            data=lambda part=part: part.reshape(-1).view(np.uint8),
        )


def test_export_takes_the_newest_step_of_a_run(run_folder, arrays, tmp_path):
    assert main(["export", str(run_folder), str(tmp_path / "hf")]) == 0
    with open_source(tmp_path / "hf") as source:
        assert_equal(read_arrays(source), arrays)
        assert source.licence == "openrail"
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"
    assert main(["export", str(run_folder / "checkpoints" / "step_00000010"), str(tmp_path / "old")]) == 0
    with open_source(tmp_path / "old") as source:
        assert np.array_equal(source.read("embed.weight").array(), 2 * arrays["embed.weight"])


def test_a_run_is_inspected_and_converted_in_plain_words(run_folder, tmp_path, capsys):
    assert main(["inspect", str(run_folder)]) == 0
    assert capsys.readouterr().out.split()[:2] == ["format", "native"]
    assert main(["convert", str(run_folder), str(tmp_path / "u"), "--format", "ds_universal", "--dry-run"]) == 0
    predicted = re.search(r"writes +[\d,]+ bytes \((.*)\)", capsys.readouterr().out)[1]
    assert main(["convert", str(run_folder), str(tmp_path / "u"), "--format", "ds_universal"]) == 0
    assert f"{tmp_path / 'u'}: {predicted} in" in capsys.readouterr().out


def test_a_dry_run_names_blocks_that_are_left_out_once(teacher, tmp_path, capsys):
    assert (
        main(["inherit", str(teacher), str(tmp_path / "s"), "--layers", "2,0", "--reset", "final_norm", "--dry-run"])
        == 0
    )
    left_out = [line for line in capsys.readouterr().out.splitlines() if "dropped:" in line]
    assert [" ".join(line.split()) for line in left_out] == [
        "final_norm.weight dropped: reset",
        "18 tensors of blocks 1, 3 dropped: layer not chosen",
    ]


@pytest.fixture
def damaged_run(run_folder, tmp_path):
    """The run's older step with one bit flipped, in its second rank's part of the first tensor."""
    folder = tmp_path / "damaged"
    shutil.copytree(run_folder / "checkpoints" / "step_00000010", folder)
    with open_source(folder) as source:
        extent = source.tensors["embed.weight"].pieces[1].extent
    data = bytearray(Path(extent.file).read_bytes())
    data[extent.offset + 70] ^= 1
    Path(extent.file).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "words", [["export"], ["convert"], ["convert", "--format", "meta", "--tp", "2"], ["inherit", "--layers", "0"]]
)
def test_a_damaged_checkpoint_is_refused(damaged_run, tmp_path, capsys, words):
    assert main([words[0], str(damaged_run), str(tmp_path / "out"), *words[1:]]) == 5
    told = capsys.readouterr().err
    assert "rank_00001.safetensors was changed in tensor embed.weight (weight): its xxh3 differs" in told
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_what_is_not_taken_along_may_be_damaged(damaged_run, tmp_path):
    assert main(["inherit", str(damaged_run), str(tmp_path / "s"), "--layers", "0", "--reset", "embed"]) == 0


@pytest.mark.parametrize("name", ["state.json", "rank_00001.json", "side/tokenizer.json"])
def test_a_damaged_description_of_a_checkpoint_is_refused(run_folder, tmp_path, capsys, name):
    folder = tmp_path / "damaged"
    shutil.copytree(run_folder / "checkpoints" / "step_00000010", folder)
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("0", "1", 1).replace("{}", "[]"))
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 5
    assert f"{name} was changed" in capsys.readouterr().err


def test_zero_copy_shares_the_files(teacher, tmp_path, capsys, monkeypatch):
    source, linked, copied = (tmp_path / name for name in ("td", "linked", "copied"))
    assert main(["convert", str(teacher), str(source), "--format", "torch_dist", "--tp", "2"]) == 0
    words = ["--layers", "3,0,0", "--format", "torch_dist"]
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["inherit", str(source), str(linked), *words, "--zero-copy", "--dry-run", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert (predicted["bytes_to_read"], predicted["bytes_to_write"]) == (0, 0)
    parsed = []
    with monkeypatch.context() as patch:
        real = dcp_metadata.read_pickle
        patch.setattr(dcp_metadata, "read_pickle", lambda path: parsed.append(path) or real(path))
        patch.setattr(torch_dist, "make_sink", None)
        assert main(["inherit", str(source), str(linked), *words, "--zero-copy"]) == 0
    assert len(parsed) == 1
    assert {name: (linked / name).stat().st_size for name in predicted["files"]} == predicted["files"]
    assert main(["inherit", str(source), str(copied), *words]) == 0
    assert main(["verify", str(linked), str(copied)]) == 0
    assert {path: path.read_bytes() for path in before} == before
    shared = [path for path in linked.rglob("*.distcp") if path.stat().st_nlink == 2]
    assert len(shared) == 2
    assert main(["verify", str(linked), str(linked / "manifest.json")]) == 0
    shutil.copytree(source / "release", source / "iter_0000009")  # a run went on: the manifest is of its start
    (source / "latest_checkpointed_iteration.txt").write_text("9")
    assert main(["inherit", str(source), str(tmp_path / "late"), *words, "--zero-copy"]) == 0
    assert json.loads((tmp_path / "late" / "inherit.json").read_text())["hashes"] == "unverified"
    assert not (tmp_path / "late" / "manifest.json").exists()
    capsys.readouterr()
    assert main(["inherit", str(teacher), str(tmp_path / "no"), *words, "--zero-copy"]) == 2
    assert "--zero-copy links torch_dist" in capsys.readouterr().err
    assert main(["inherit", str(source), str(tmp_path / "no"), *words, "--zero-copy", "--reset", "mlp"]) == 2
    assert not (tmp_path / "no").exists()


def test_zero_copy_refuses_a_layout_that_links_cannot_have(teacher, tmp_path, capsys):
    source, words = tmp_path / "td", ["--format", "torch_dist", "--zero-copy"]
    assert main(["convert", str(teacher), str(source), "--format", "torch_dist", "--tp", "2"]) == 0
    others = (("tp", "4", "2"), ("pp", "2", "1"), ("vpp", "2", "1"), ("dialect", "global", "homogeneous"))
    for option, asked, held in (*others, ("vocab-multiple", "64", "128")):
        for more in ([], ["--dry-run"]):
            command = ["convert", str(source), str(tmp_path / "no"), *words, f"--{option}", asked, *more]
            assert main(command) == 2
            message = capsys.readouterr().err
            assert f"cannot follow --{option} {asked}" in message
            assert f"{held} in {source}" in message
        assert not (tmp_path / "no").exists()
    same = ["--tp", "2", "--dialect", "homogeneous"]
    assert main(["convert", str(source), str(tmp_path / "yes"), *words, *same]) == 0
    assert main(["verify", str(source), str(tmp_path / "yes")]) == 0


def test_a_student_in_any_layout_can_be_continued(teacher, arrays, tmp_path, capsys, monkeypatch):
    words = ["inherit", str(teacher), str(tmp_path / "s"), "--layers", "2,0", "--format", "torch_dist", "--tp", "2"]
    words += ["--dialect", "global", "--vocab-multiple", "5", "--resume", "--threads", "1", "--json"]
    monkeypatch.setenv("MI_FAULT", "transfer:*:9:raise")
    assert main(words) == 1
    assert not (tmp_path / "s").exists()
    monkeypatch.delenv("MI_FAULT")
    capsys.readouterr()
    assert main(words) == 0
    done = json.loads(capsys.readouterr().out)
    assert 0 < done["bytes_written"] < 0.9 * done["bytes_to_write"]
    with open_source(tmp_path / "s") as source:
        assert source.details["homogeneous"] is False
        assert np.array_equal(source.read("layers.0.attn.o.weight").array(), arrays["layers.2.attn.o.weight"])
    metadata = dcp_metadata.read_metadata(tmp_path / "s" / "release")
    assert metadata.tensors["embedding.word_embeddings.weight"].shape == (130, 32)


@pytest.mark.slow
def test_doors_for_megatron_users(teacher, tmp_path):
    tools = {"convert": [], "inherit": ["--layers", "first:2"]}
    for name, more in tools.items():
        command = [sys.executable, ROOT / "tools" / f"{name}_checkpoint.py", teacher, tmp_path / name, *more]
        variables = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name / "config.json").is_file()
