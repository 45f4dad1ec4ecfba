"""lm-eval tasks on the model in training: what 'minherit evaluate' says of the saved checkpoint, on every layout."""

import json

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval")

from tests.support import forked_world, tiny_run
from tests.support.tiny_hf import tiny_llama
from tests.support.tiny_run import curve, rows, saved_hashes

pytestmark = pytest.mark.slow

LAYOUTS = {
    "one": (1, ()),
    "tp2": (2, ("engine=megatron", "parallel.tp=2", "parallel.sequence_parallel=true")),
    "cp2": (2, ("engine=megatron", "parallel.cp=2")),
    "zero3": (2, ("engine=deepspeed", "deepspeed.zero_stage=3")),
}
ITEMS = 13
"""Odd, so that two replicas do not have equally many batches."""


def in_a_fork(folder, work):
    """Leaves this process, of which the ranks are copies, without the threads that torch starts where it computes."""
    ended = forked_world.World(folder / "fork", 1, lambda: work() and 0, {"HF_HUB_OFFLINE": "1"}).wait()
    assert ended.codes == [0], ended.text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, a model with a tokenizer, and the files of two tasks."""
    forked_world.preload(
        "lm_eval", "datasets", "transformers", "megatron_inherit.eval.harness.lm", "megatron_inherit.train.tasks"
    )
    folder = tmp_path_factory.mktemp("tasks")
    tiny_run.write_corpus(folder / "corpus")
    in_a_fork(folder, lambda: tiny_llama(folder / "model", layers=2, vocab_size=tiny_run.VOCABULARY))
    choices = [
        {"query": f"Question: what follows {n}?", "choices": [str(n + 1), str(n + 7), "nothing at all"], "gold": n % 3}
        for n in range(ITEMS)
    ]
    clozes = [{"context": f"one two {n} two one", "continuation": "two"} for n in range(ITEMS)]
    (folder / "data").mkdir()
    for name, items in (("piqa", choices), ("lambada_openai", clozes)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def recipe(folder, place, **sections):
    tasks = {"names": ["piqa", "lambada_openai"], "data_dir": str(place / "data"), "every_steps": 5}
    common = {
        "model": {"preset": None, "shape": {}, "path": str(place / "model"), "init": "weights"},
        "train": {"steps": 8},
        "checkpoint": {"every_steps": 8},
        "eval": {"every_steps": 8, "tasks": tasks},
    }
    for name, section in sections.items():
        common[name] = {**common.get(name, {}), **section}
    return tiny_run.recipe(folder, place / "corpus", **common)


def figures(row):
    return {key: value for key, value in row.items() if "/" in key}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_in_training_are_those_of_the_saved_checkpoint(tmp_path, place, layout):
    size, words = LAYOUTS[layout]
    ended = forked_world.run(tmp_path, ["train", recipe(tmp_path, place), *words], size=size, HF_HUB_OFFLINE="1")
    assert ended.codes == [0] * size, ended.text
    found = rows(tmp_path / "run", "tasks")
    assert [row["step"] for row in found] == [5, 8]
    assert "step 8: piqa/acc" in ended.text
    names = ["--tasks", "piqa,lambada_openai", "--data-dir", str(place / "data"), "--device", "cpu"]
    evaluated = forked_world.run(tmp_path / "evaluate", ["evaluate", str(tmp_path / "run"), *names])
    assert evaluated.codes == [0], evaluated.text
    wanted = json.loads((tmp_path / "run" / "evaluations" / "piqa,lambada_openai.json").read_text())["rows"]
    expected = {f"{row['task']}/{row['metric']}": row["value"] for row in wanted}
    got = figures(found[-1])
    assert expected.keys() == {"piqa/acc", "piqa/acc_norm", "lambada_openai/acc", "lambada_openai/perplexity"}
    for name, value in expected.items():
        exact = name != "lambada_openai/perplexity"
        assert got[name] == (value if exact else pytest.approx(value, rel=1e-3)), name
    errors = {f"{row['task']}/{row['metric']}_stderr": row["stderr"] for row in wanted}
    assert got["piqa/acc_stderr"] == pytest.approx(errors["piqa/acc_stderr"])


def test_scoring_and_a_broken_logger_change_nothing_in_the_training(tmp_path, place):
    plain = recipe(tmp_path / "plain", place, eval={"tasks": None})
    assert forked_world.run(tmp_path, ["train", plain]).codes == [0]
    scored = recipe(tmp_path / "scored", place, logging={"loggers": ["tensorboard"], "every_steps": 1})
    (tmp_path / "scored" / "run").mkdir()
    (tmp_path / "scored" / "run" / "tensorboard").write_text("a file where the logger wants a folder")
    ended = forked_world.run(tmp_path, ["train", scored], HF_HUB_OFFLINE="1")
    assert ended.codes == [0], ended.text
    assert ended.text.count("The logger tensorboard cannot be opened and is left out") == 1
    one, other = tmp_path / "plain" / "run", tmp_path / "scored" / "run"
    assert curve(one) == curve(other)
    assert saved_hashes(one, 8) == saved_hashes(other, 8)


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("parallel.pp=2", 3, "minherit evaluate"),
        ("eval.tasks.names=[]", 3, "exactly one of names and suite"),
        ("eval.tasks.suite=inheritune", 3, "exactly one of names and suite"),
        ("eval.tasks.names=[piqua]", 2, "Did you mean 'piqa'?"),
        ("eval.tasks={suite: inheritun}", 2, "There is no suite"),
        ("eval.tasks.data_dir=nowhere", 4, "nowhere is not a folder"),
        ("eval.tasks.names=[boolq]", 4, "Files of 1 of 1 tasks are missing"),
        ("eval.tasks={names: [wnli]}", 4, "lm-eval cannot get at the data of its tasks"),
        ("eval.tasks.nmaes=[piqa]", 3, "Nearest: eval.tasks.names"),
    ],
)
def test_mistakes_are_said_before_a_model_is_built(tmp_path, place, override, code, said):
    ended = forked_world.run(tmp_path, ["train", recipe(tmp_path, place), override])
    assert ended.codes == [code], ended.text
    assert said in ended.text
    assert "Traceback" not in ended.text


def test_a_model_without_a_tokenizer_is_refused(tmp_path, place):
    shape = {"num_layers": 2, "hidden_size": 32, "head_dim": 8, "ffn_size": 64}
    path = recipe(tmp_path, place, model={"preset": "llama-tiny", "path": None, "init": "random", "shape": shape})
    ended = forked_world.run(tmp_path, ["train", path])
    assert ended.codes == [4], ended.text
    assert "no tokenizer" in ended.text
