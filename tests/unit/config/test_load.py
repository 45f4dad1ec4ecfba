import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.config.load import all_keys, build_config, config_hash, load_recipe, recipe_names, to_yaml

BASE = """
run: {output: runs/x}
model: {path: student}
data: {path: corpus}
train: {steps: 20, global_batch: 8, micro_batch: 2, sequence_length: 64, dtype: fp32}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(BASE)
    return path


def message(recipe, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 3
    return text


def test_a_small_recipe_and_its_defaults(recipe):
    config = load_recipe(recipe)
    assert config.engine == "megatron"
    assert config.data.path == "corpus"
    assert config.optimizer.beta2 == 0.95


def test_overrides_are_yaml_and_numbers_may_be_text(recipe):
    config = load_recipe(
        recipe,
        [
            "optimizer.lr=1e-4",
            "train.steps=null",
            "train.budget=1B",
            "logging.loggers=[wandb, tensorboard]",
            "engine=deepspeed",
        ],
    )
    assert config.optimizer.lr == 1e-4
    assert config.train.budget == 10**9
    assert config.logging.loggers == ("wandb", "tensorboard")
    assert config.engine == "deepspeed"


def test_resolved_recipe_reads_back_as_itself(recipe, tmp_path):
    config = load_recipe(recipe, ["train.batch_ramp={start: 2, increment: 2, samples: 100}"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_recipe(again) == config
    assert config_hash(load_recipe(again)) == config_hash(config)
    assert config_hash(load_recipe(recipe)) != config_hash(config)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz: unknown key", "Nearest: train.steps"]),
        ("lr=1", ["lr: unknown key", "Nearest: optimizer.lr"]),
        ("optimiser.lr=1", ["optimiser", "Nearest: optimizer"]),
        (
            "train.batch_ramp={start: 2, incremnt: 2, samples: 9}",
            ["train.batch_ramp.incremnt: unknown key", "increment"],
        ),
        ("optimizer.lr=.nan", ["optimizer.lr"]),
        ("optimizer.lr=.inf", ["optimizer.lr"]),
        ("optimizer.lr=-1", ["optimizer.lr", "-1"]),
        ("optimizer.lr=yes", ["optimizer.lr"]),
        ("train.global_batch=7", ["train.global_batch", "micro_batch"]),
        ("train.global_batch=eight", ["train.global_batch", "eight"]),
        ("train.budget=1M", ["exactly one of train.steps and train.budget"]),
        ("train.steps=null", ["exactly one of train.steps and train.budget", "neither"]),
        ("train.steps=" + "9" * 5000, ["train.steps"]),
        ("train.steps=99999999999999999999", ["train.steps"]),
        ("train.dtype=fp16", ["train.dtype", "bf16"]),
        ("engine=hydra", ["engine", "deepspeed"]),
        ("model._target_=os.system", ["model._target_: unknown key"]),
        ("model.path=!!python/object/apply:os.system ['touch x']", ["override model.path", "constructor"]),
        ("run.output=a\x00b", ["run.output"]),
        ("model.preset=gpt2", ["exactly one of model.path and model.preset"]),
        ("schedule.warmup_steps=30", ["schedule.warmup_steps"]),
        ("schedule.floor_lr=1", ["schedule.floor_lr"]),
        ("schedule.kind=inverse-sqrt", ["schedule.warmup_steps"]),
        ("checkpoint.keep_every_steps=1500", ["checkpoint.keep_every_steps"]),
        ("train.batch_ramp={start: 4, increment: 3, samples: 10}", ["train.batch_ramp"]),
        ("train", ["not an override"]),
        ("train..steps=1", ["not an override"]),
        ("train.steps.x=1", ["train.steps: has no keys below it"]),
        ("train.steps=[", ["override train.steps"]),
    ],
)
def test_one_line_with_key_path_and_cause(recipe, override, words):
    text = message(recipe, override)
    assert all(word in text for word in words), text


def test_zero_and_pipelines_exclude_each_other(recipe):
    text = message(recipe, "engine=deepspeed", "deepspeed.zero_stage=3", "parallel.pp=2")
    assert "ZeRO-2/3 and pipelines exclude each other" in text
    load_recipe(recipe, ["deepspeed.zero_stage=3", "parallel.pp=2"])
    assert "phantom" in message(recipe, "engine=deepspeed", "deepspeed.zero_stage=0", "train.dtype=bf16")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("- 1\n", "mapping"),
        ("run: {output: a}\nrun: {output: b}\n", "'run' stands twice"),
        (BASE + "eval:\n  every_steps: 1\n  every_steps: 2\n", "'every_steps' stands twice"),
        ("a: &x [1]\nb: *x\n", "anchors"),
        ("a: [\n", "not YAML"),
        ("\x00", "not YAML"),
        ("run: !!python/object/apply:os.system ['false']\n", "constructor"),
        ("[" * 5000, "nested"),
        ("1: 2\n", "1"),
        ("? [1, 2]\n: 3\n", ""),
        ("run: 2024-99-99\n", "read"),
    ],
)
def test_damaged_files(recipe, text, word):
    recipe.write_text(text)
    assert word in message(recipe)


def test_bytes_that_are_not_text(recipe):
    recipe.write_bytes(b"run: \xff\xfe")
    assert "UTF-8" in message(recipe)
    recipe.write_bytes(b"#" * (2 << 20))
    assert "too large" in message(recipe)


def test_unknown_recipe_names_the_nearest():
    name = recipe_names()[0]
    assert f"Nearest: {name}" in message(name[:-1])
    assert "no recipe file" in message("nowhere/x.yaml")


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=3),
    st.sampled_from(["1e-4", "1B", "-1", "nan", "inf", ".inf", "0", "megatron", "3.5", "~"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(all_keys()) | st.text(max_size=12), VALUES), min_size=1, max_size=3))
def test_no_value_anywhere_gives_more_than_one_clear_line(changes):
    values = yaml.safe_load(BASE)
    for key, value in changes:
        section, _, name = key.partition(".")
        if name and isinstance(values.setdefault(section, {}), dict):
            values[section][name] = value
        else:
            values[section] = value
    told = ""
    try:
        assert build_config(yaml.safe_load(to_yaml(config := build_config(values)))) == config
    except ConfigError as error:
        told = str(error)
    assert not told or (told.startswith("recipe: ") and "\n" not in told)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(alphabet=st.sampled_from(":-[]{}!&*#|>'\"%@`, \n\tabrun01.e"), max_size=60))
def test_no_text_gives_a_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_recipe(path)


def test_a_mistake_is_told_within_a_second_and_without_torch(recipe):
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "from megatron_inherit.base.errors import ConfigError\n"
        "from megatron_inherit.config.load import load_recipe\n"
        f"try: load_recipe({str(recipe)!r}, ['train.stepz=1'])\n"
        "except ConfigError as error: print(time.perf_counter() - start)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    fastest = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    )
    assert fastest < 1.0
    assert time.get_clock_info("perf_counter").monotonic


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_right_for_both_engines(name):
    assert load_recipe(name, ["engine=megatron"]).engine == "megatron"
    without_pipeline = ["parallel.pp=1", "parallel.vpp=1", "parallel.first_stage_layers=null"]
    assert load_recipe(name, ["engine=deepspeed", *without_pipeline]).engine == "deepspeed"
