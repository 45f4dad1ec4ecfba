"""What ``inherit`` refuses before it measures, fits or hashes, each of which takes minutes for a real teacher."""

import pytest

from megatron_inherit.checkpoint import manifest
from megatron_inherit.cli.main import main
from megatron_inherit.eval import importance, repair
from tests.support.checkpoints import llama, random_arrays, write_checkpoint

SLOW = (
    ["--layers", "auto:ppl:3"],
    ["--layers", "first:3", "--repair", "final-norm"],
    ["--layers", "first:3", "--hash-teacher"],
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("t") / "teacher", llama(), random_arrays(llama()), "hf")


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("measured")

    monkeypatch.setattr(importance, "choose_layers", refuse)
    monkeypatch.setattr(repair, "fit_repair", refuse)
    monkeypatch.setattr(manifest, "_hash_file", refuse)


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--dtype", "int8"], 2, "not a dtype"),
        (["--format", "megatron", "--pp", "2"], 5, "3 layers cannot be shared out over 2"),
        (["--format", "megatron", "--dialect", "core"], 2, "Unknown Megatron dialect"),
        (["--format", "torch_dist", "--tp", "5", "--vocab-multiple", "1"], 5, "cannot be cut in 5"),
        (["--format", "torch_dist", "--zero-copy"], 2, "--zero-copy"),
        (["--max-shard-size", "much"], 2, "much"),
    ],
)
def test_the_output_is_looked_at_first(teacher, tmp_path, capsys, slow, words, code, message):
    assert main(["inherit", str(teacher), str(tmp_path / "s"), *slow, *words]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["auto:ppl:5"], 2, "1 to 4"),
        (["auto:ppl:0"], 2, "1 to 4"),
        (["auto:ppl"], 2, "auto:METRIC:N"),
        (["auto:ppl:3", "--optimizer", "keep", "--format", "torch_dist"], 3, "no optimizer state"),
        (["auto:ppl:3", "--repair", "magic"], 2, "unknown method 'magic'"),
        (["auto:ppl:3", "--repair", "keep-last:4"], 2, "at most 3"),
        (["auto:ppl:3", "--repair", "affine", "--reset", "norm"], 2, "Leave --reset"),
        (["auto:ppl:3", "--repair", "affine", "--repair-text", "/no/text"], 4, "/no/text does not exist"),
        (["first:3", "--repair", "affine", "--optimizer", "keep", "--format", "torch_dist"], 2, "Leave --optimizer"),
    ],
)
def test_the_choice_is_looked_at_first(teacher, tmp_path, capsys, words, code, message):
    assert main(["inherit", str(teacher), str(tmp_path / "s"), "--layers", *words]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_shape_has_no_optimizer_state(tmp_path, capsys):
    words = ["--layers", "all", "--reset", "all", "--format", "torch_dist", "--optimizer", "keep"]
    assert main(["inherit", "llama-tiny", str(tmp_path / "s"), *words]) == 2
    assert "no optimizer state" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
