"""A study is settled before anything runs: what cannot be compared, or is not understood, is refused."""

import pytest
import yaml

from megatron_inherit.base.errors import ConfigError, UsageError
from megatron_inherit.config.load import recipe_names
from megatron_inherit.study.runner import array_share, chosen_jobs, study_yaml
from megatron_inherit.study.schema import SHIPPED, load_study

ONE = {"name": "random", "layers": "all"}
RECIPE = {
    "model": {"preset": "gpt2-tiny", "init": "random"},
    "data": {"path": "corpus", "epochs": 0},
    "train": {"steps": 40, "global_batch": 4, "sequence_length": 32, "dtype": "fp32"},
    "eval": {"windows": "windows.safetensors"},
}


def study(tmp_path, **changes):
    values = {
        "name": "toy",
        "question": "Which?",
        "output": str(tmp_path / "out"),
        "control": "random",
        "recipe": RECIPE,
        "set": {"train.steps": 20},
        "arms": [
            {"name": "all", "layers": "first:2"},
            {"name": "random", "layers": "first:2", "init": "random"},
            {"name": "stacked", "layers": "0,1,0,1", "origin": "random"},
        ],
    } | changes
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_every_shipped_study_settles():
    names = recipe_names(SHIPPED)
    assert "initialisation-cpu" in names
    for name in names:
        settled = load_study(name)
        assert settled.section.name == name
        assert len(settled.jobs) == len(settled.section.arms) * len(settled.section.seeds)


def test_arms_get_their_seed_steps_start_and_changes(tmp_path):
    arms = [
        {"name": "all", "layers": "first:2", "steps": 8, "set": {"distill.teacher": "{teacher}"}},
        {"name": "random", "model": {"preset": "gpt2-tiny", "init": "random"}, "init": "random"},
    ]
    settled = load_study(study(tmp_path, arms=arms, seeds=[3]), ["optimizer.lr=0.5"])
    one, two = settled.jobs
    assert settled.teacher.config.train.steps == 40
    assert (one.config.train.steps, two.config.train.steps) == (8, 20)
    assert one.config.run.seed == 3
    assert one.config.optimizer.lr == 0.5
    assert one.config.model.path == str(one.start)
    assert one.config.distill.teacher == str(settled.teacher.folder)
    assert two.config.model.preset == "gpt2-tiny"


def test_what_is_written_into_the_folder_settles_to_the_same(tmp_path):
    settled = load_study(study(tmp_path), ["seeds=[5,6]", "data.path=elsewhere"], folder=tmp_path / "here")
    (tmp_path / "again.yaml").write_text(study_yaml(settled))
    again = load_study(tmp_path / "again.yaml")
    assert again == settled
    assert again.jobs[0].config.data.path == "elsewhere"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": {"data.path": "other"}}, None),
        ({"arms": [ONE, {"name": "b", "layers": "all", "set": {"data.path": "other"}}]},
         r"arm b differs in data\.path.*Set varies: data"),
        ({"arms": [ONE, {"name": "b", "layers": "all", "set": {"train.global_batch": 8}}]},
         r"arm b differs in train\.global_batch"),
        ({"varies": "data", "arms": [ONE,
                                     {"name": "b", "layers": "all", "set": {"eval.windows": "other"}}]},
         r"arm b differs in eval\.windows.*scored alike"),
        ({"teacher": {"set": {"eval.windows": "other"}}}, "the teacher is scored by other windows"),
        ({"recipe": RECIPE | {"eval": {}}}, r"needs eval\.windows"),
        ({"control": "randm"}, "control: there is no arm 'randm'"),
        ({"arms": [{"name": "random", "layers": "all", "layer": 3}]}, r"unknown key\. Nearest: arms\.0\.layers"),
        ({"arms": [ONE, dict(ONE)]}, "stands twice"),
        ({"seeds": [1, 2, 1]}, "seeds: one stands twice"),
        ({"arms": [{"name": "random", "layers": "all", "origin": "later"}]}, "origin 'later' is no earlier arm"),
        ({"arms": [{"name": "random"}]}, "exactly one of layers and model"),
        ({"arms": [{"name": "random", "layers": "all", "reset": ["mlp"], "repair": {"methods": "affine"}}]},
         "arm random: a repair is fitted to whole, inherited blocks"),
        ({"arms": [{"name": "random", "layers": "all", "init": "random", "repair": {"methods": "affine"}}]},
         "arm random: a repair is fitted to whole, inherited blocks"),
        ({"arms": [{"name": "random", "layers": "all", "set": {"optimizer.lrr": 1}}]}, r"optimizer\.lrr: unknown key"),
        ({"claims": [{"id": "C", "says": "x", "lower": "all", "higher": "nobody", "by": 1}]},
         "claim C: there is no arm"),
        ({"claims": [{"id": "C", "says": "x", "lower": "all", "higher": "random"}]}, "exactly one of by, within"),
        ({"arms": [{"name": "random", "layers": "first:x"}]}, "toy: arm random: --layers 'first:x' is not understood"),
        ({"arms": [{"name": "random", "layers": "auto:magic:2"}]}, "arm random: There is no measure 'magic'"),
        ({"arms": [{"name": "random", "layers": "all", "repair": {"methods": "magic"}}]}, "unknown method 'magic'"),
        ({"name": "../up"}, "name"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_or_understood_is_refused(tmp_path, changes, message):
    path = study(tmp_path, **changes)
    if message is None:
        assert load_study(path).jobs[0].config.data.path == "other"
        return
    with pytest.raises(ConfigError, match=message):
        load_study(path)


def test_data_may_differ_where_it_is_the_question(tmp_path):
    arms = [ONE, {"name": "b", "layers": "all", "set": {"data.path": "other"}}]
    assert load_study(study(tmp_path, arms=arms, varies="data")).jobs[-1].config.data.path == "other"


def test_an_unknown_study_names_the_nearest():
    with pytest.raises(ConfigError, match="Nearest: initialisation-cpu"):
        load_study("initialization-cpu")


def test_chosen_arms_bring_what_they_come_from(tmp_path):
    settled = load_study(study(tmp_path))
    assert [job.name for job in chosen_jobs(settled, ["stacked"])] == [
        "random, seed 1", "random, seed 2", "stacked, seed 1", "stacked, seed 2",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="there is none"):
        chosen_jobs(settled, ["nobody"])


def test_an_array_shares_the_arms_out_and_keeps_chains_together(tmp_path):
    jobs = load_study(study(tmp_path)).jobs
    shares = []
    for task in range(4, 7):
        share, first = array_share(
            jobs,
            {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3"},
        )
        assert first == (task == 4)
        shares.append([job.name for job in share])
    assert sorted(name for share in shares for name in share) == sorted(job.name for job in jobs)
    for seed in (1, 2):
        assert any({f"random, seed {seed}", f"stacked, seed {seed}"} <= set(share) for share in shares)
    assert array_share(jobs, {}) == (jobs, True)
