import json

import numpy as np
import pytest
import torch

from megatron_inherit.arch.model_config import Rope
from megatron_inherit.checkpoint.compare import compare, compare_configs, compare_manifest
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.manifest import hash_source, load_file, to_json
from megatron_inherit.cli.main import main
from tests.support.checkpoints import llama, random_arrays, write_checkpoint


@pytest.fixture
def pair(tmp_path):
    arrays = random_arrays(llama())
    left = write_checkpoint(tmp_path / "left", llama(), arrays, "hf")
    arrays["layers.2.mlp.up.weight"] = arrays["layers.2.mlp.up.weight"].copy()
    arrays["layers.2.mlp.up.weight"][5, 7] += 0.5
    arrays["layers.2.mlp.up.weight"][40, 0] = np.nan
    right = write_checkpoint(tmp_path / "right", llama(), arrays, "hf", max_shard_bytes=20_000)
    return left, right


def test_first_differing_element_is_named(pair, capsys):
    assert main(["verify", *map(str, pair)]) == 1
    output = capsys.readouterr().out
    assert "layers.2.mlp.up.weight[5, 7]" in output
    assert "2 elements differ" in output
    assert "38 of 39 tensors are equal" in output


def test_equal_is_exit_0_across_layouts(tmp_path, capsys):
    arrays = random_arrays(llama())
    paths = [
        write_checkpoint(tmp_path / "one", llama(), arrays, "hf"),
        write_checkpoint(tmp_path / "two", llama(), arrays, "hf", max_shard_bytes=9_000),
        write_checkpoint(tmp_path / "three", llama(), arrays, "megatron", tp=2, pp=2),
    ]
    for other in paths[1:]:
        assert main(["verify", str(paths[0]), str(other)]) == 0
    assert "39 of 39" in capsys.readouterr().out
    with open_source(paths[0]) as one, open_source(paths[2]) as three:
        assert hash_source(one) == hash_source(three)


class TestStudents:
    """A student is compared with the blocks that it was made of."""

    @pytest.fixture
    def teacher(self, tmp_path):
        return write_checkpoint(tmp_path / "teacher", llama(), random_arrays(llama()), "hf")

    def student(self, teacher, *words):
        path = teacher.parent / "student"
        assert main(["inherit", str(teacher), str(path), "--layers", "3,0,0", *words]) == 0
        return path

    def test_by_the_record_in_its_folder(self, teacher, tmp_path, capsys):
        student = self.student(teacher, "--dtype", "bf16", "--reset", "final_norm")
        assert main(["convert", str(teacher), str(tmp_path / "ranks"), "--format", "megatron", "--tp", "2"]) == 0
        for first in (teacher, tmp_path / "ranks"):
            capsys.readouterr()
            assert main(["verify", str(first), str(student)]) == 0
            told = capsys.readouterr().out
            assert "by its inherit.json: its blocks are 3, 0, 0 of" in told
            assert "not compared, as they are not copies: final_norm.weight" in told
            assert "29 of 29 tensors are equal" in told

    def test_a_changed_element_is_named(self, teacher, capsys):
        student = self.student(teacher)
        with open_source(student) as source:
            (piece,) = source.tensors["layers.1.attn.o.weight"].pieces
        with open(piece.extent.file, "r+b") as file:
            file.seek(piece.extent.offset + 4 * 33)
            file.write(np.float32(7).tobytes())
        assert main(["verify", str(teacher), str(student)]) == 1
        told = capsys.readouterr().out
        assert "layers.1.attn.o.weight[1, 1]: " in told
        assert "and 7;" in told

    def test_by_a_list_of_layers(self, teacher, capsys):
        student = self.student(teacher)
        (student / "inherit.json").unlink()
        assert main(["verify", str(teacher), str(student)]) == 1
        assert main(["verify", str(teacher), str(student), "--layers", "3,0,1"]) == 1
        assert main(["verify", str(teacher), str(student), "--layers", "3,0,0"]) == 0
        assert "by --layers" in capsys.readouterr().out
        assert main(["verify", str(teacher), str(student), "--layers", "3,0"]) == 5

    def test_two_students_and_a_converted_teacher_are_compared_whole(self, teacher, tmp_path, capsys):
        student = self.student(teacher)
        for name, layers in (("same", "3,0,0"), ("other", "3,0,1")):
            assert main(["inherit", str(teacher), str(tmp_path / name), "--layers", layers]) == 0
        assert main(["convert", str(teacher), str(tmp_path / "again")]) == 0
        capsys.readouterr()
        assert main(["verify", str(student), str(tmp_path / "same")]) == 0
        assert main(["verify", str(student), str(tmp_path / "other")]) == 1
        assert main(["verify", str(teacher), str(tmp_path / "again")]) == 0
        assert "is a student" not in capsys.readouterr().out


class TestOptimizer:
    """Moments and fp32 weights are compared on request, whatever the two formats."""

    KEEP = ("--optimizer", "keep")

    @pytest.fixture
    def universal(self, tmp_path):
        arrays = random_arrays(llama())
        kinds = enumerate(("fp32", "exp_avg", "exp_avg_sq"), 1)
        state = {f"{kind}:{name}": values * number for number, kind in kinds for name, values in arrays.items()}
        options = {"optimizer": True, "iteration": 7, "adam": (0.9, 0.95, 1e-8)}
        return write_checkpoint(tmp_path / "universal", llama(), arrays | state, "ds_universal", **options)

    @pytest.fixture
    def core(self, universal, tmp_path):
        """As Megatron-Core keeps it: bf16 weights beside fp32 ones."""
        words = ["--format", "torch_dist", "--tp", "2", "--dtype", "bf16", *self.KEEP]
        assert main(["convert", str(universal), str(tmp_path / "core"), *words]) == 0
        return tmp_path / "core"

    def change(self, folder, key, place, value):
        with open_source(folder) as source:
            piece = next(one for one in source.find(key).pieces if one.start == (0,) * len(one.start))
        with open(piece.extent.file, "r+b") as file:
            file.seek(piece.extent.offset + piece.extent.item_size * place)
            file.write(value)

    def test_two_formats_of_one_run_are_equal(self, universal, core, capsys):
        assert main(["verify", str(universal), str(core)]) == 1  # bf16 is not fp32
        capsys.readouterr()
        assert main(["verify", str(universal), str(core), "--optimizer"]) == 0
        assert main(["verify", str(core), str(universal), "--optimizer", "--json"]) == 0
        told = capsys.readouterr().out
        assert "156 of 156 tensors are equal" in told
        assert '"tensors": 156' in told

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("exp_avg:layers.2.mlp.down.weight", b"\x00\x00\x80\x3f"),
            ("exp_avg_sq:head.weight", b"\x00\x00\x80\x3f"),
            ("fp32:embed.weight", b"\x00\x00\x80\x3f"),
            ("layers.0.mlp.down.weight", b"\x80\x3f"),
        ],
    )
    def test_a_changed_element_of_any_kind_is_named(self, universal, core, capsys, key, value):
        self.change(core, key, 3, value)
        capsys.readouterr()
        for pair in ((universal, core), (core, universal)):
            assert main(["verify", *map(str, pair), "--optimizer"]) == 1
            told = capsys.readouterr().out
            assert f"{key}[0, 3]: " in told
            assert "1 elements differ" in told
            assert "155 of 156" in told

    def test_other_settings_are_named(self, universal, core, capsys):
        path = core / "iter_0000007" / "common.pt"
        common = torch.load(path, weights_only=False)
        for group in common["optimizer"]["optimizer"]["param_groups"]:
            group |= {"step": 8, "betas": (0.9, 0.999)}
        torch.save(common, path)
        assert main(["verify", str(universal), str(core), "--optimizer"]) == 1
        told = capsys.readouterr().out
        assert "optimizer updates: values 7 and 8" in told
        assert "optimizer betas and epsilon: values (0.9, 0.95, 1e-08) and (0.9, 0.999, 1e-08)" in told

    def test_students_are_compared_with_their_state(self, universal, tmp_path, capsys):
        words = ["--layers", "3,0", "--reset", "head", "--format", "torch_dist", *self.KEEP]
        assert main(["inherit", str(universal), str(tmp_path / "s"), *words]) == 0
        assert main(["verify", str(universal), str(tmp_path / "s"), "--optimizer"]) == 0
        assert "80 of 80 tensors" in capsys.readouterr().out
        self.change(tmp_path / "s", "exp_avg:layers.1.attn.o.weight", 0, b"\x00\x00\x80\x3f")
        assert main(["verify", str(universal), str(tmp_path / "s"), "--optimizer"]) == 1
        assert "exp_avg:layers.1.attn.o.weight[0, 0]" in capsys.readouterr().out

    def test_manifests_have_it(self, core, capsys):
        assert main(["verify", str(core), str(core / "manifest.json"), "--optimizer"]) == 0
        self.change(core, "exp_avg:embed.weight", 0, b"\x00\x00\x80\x3f")
        assert main(["verify", str(core), str(core / "manifest.json")]) == 0
        assert main(["verify", str(core), str(core / "manifest.json"), "--optimizer"]) == 1
        assert "exp_avg:embed.weight: hash" in capsys.readouterr().out

    def test_a_checkpoint_without_state_is_refused(self, universal, core, tmp_path, capsys):
        assert main(["convert", str(universal), str(tmp_path / "ranks"), "--format", "megatron"]) == 0
        for pair in ((tmp_path / "ranks", core), (core, tmp_path / "ranks")):
            assert main(["verify", *map(str, pair), "--optimizer"]) == 5
            told = capsys.readouterr().err
            assert "ranks (megatron) has no optimizer state that can be compared" in told
            assert "mp_rank files" in told


def test_shapes_types_and_absence(tmp_path):
    write_checkpoint(tmp_path / "a", llama(), random_arrays(llama()), "hf")
    shorter, wider = llama(num_layers=3), llama(vocab_size=131)
    write_checkpoint(tmp_path / "b", shorter, random_arrays(shorter), "hf")
    write_checkpoint(tmp_path / "c", wider, random_arrays(wider), "hf")
    write_checkpoint(tmp_path / "d", llama(), random_arrays(llama(), dtype="F16"), "hf", dtype="F16")
    with open_source(tmp_path / "a") as a:
        for name, what, count in (("b", "missing", 9), ("c", "shape", 2), ("d", "dtype", 39)):
            with open_source(tmp_path / name) as other:
                found = [one for one in compare(a, other) if one.what == what]
                assert len(found) == count, name
                assert what in found[0].describe()


def test_a_tied_head_equals_its_stored_copy(tmp_path):
    arrays = random_arrays(llama(tied=True))
    write_checkpoint(tmp_path / "tied", llama(tied=True), arrays, "hf")
    write_checkpoint(tmp_path / "untied", llama(), arrays | {"head.weight": arrays["embed.weight"]}, "hf")
    with open_source(tmp_path / "tied") as tied, open_source(tmp_path / "untied") as untied:
        assert compare(tied, untied) == []


def test_equal_tensors_of_another_function_differ(tmp_path, capsys):
    arrays = random_arrays(llama())
    write_checkpoint(tmp_path / "a", llama(), arrays, "hf")
    write_checkpoint(tmp_path / "b", llama(rope=Rope(theta=500000.0)), arrays, "hf")
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    output = capsys.readouterr().out
    assert "config rope" in output
    assert "39 of 39 tensors are equal" in output


def test_manifests_are_compared_too(pair, tmp_path, capsys):
    with open_source(pair[0]) as left, open_source(pair[1]) as right:
        (tmp_path / "left.json").write_text(json.dumps(to_json(hash_source(left))))
        assert compare_manifest(left, load_file(tmp_path / "left.json")) == []
        assert [one.tensor for one in compare_manifest(right, load_file(tmp_path / "left.json"))] == [
            "layers.2.mlp.up.weight"
        ]
    assert main(["verify", str(pair[1]), str(tmp_path / "left.json")]) == 1
    (tmp_path / "bad.json").write_text('{"files": {}}')
    assert main(["verify", str(pair[1]), str(tmp_path / "bad.json")]) == 5
    assert "no manifest of tensors" in capsys.readouterr().err


def test_inspect_lists_hashes_and_facts(pair, capsys):
    assert main(["inspect", str(pair[0])]) == 0
    output = capsys.readouterr().out
    assert "llama" in output
    assert "8 query, 2 key/value of 4" in output
    assert main(["inspect", str(pair[0]), "--json", "--hashes"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensors"]["layers.0.attn.k.weight"]["shape"] == [8, 32]
    assert len(facts["xxh3"]) == 39
    assert main(["inspect", str(pair[0]), "--tensors"]) == 0
    assert "layers.3.mlp.down.weight" in capsys.readouterr().out


def test_a_model_without_residual_connections_is_another_one():
    (found,) = compare_configs(llama(), llama(residual=False))
    assert found.tensor == "config residual"
