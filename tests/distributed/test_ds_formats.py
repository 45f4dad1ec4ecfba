"""DeepSpeed is the oracle (check 11): its own runs, its zero_to_fp32, its ds_to_universal, its universal loader."""

import argparse
import ast
import contextlib
import io
import shutil

import numpy as np
import pytest
import torch

from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.formats.hf import ROWS
from megatron_inherit.checkpoint.layout import physical_tensors
from megatron_inherit.inherit.inheritune import plan_inheritance
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.execute import execute
from megatron_inherit.plan.plan import Layout
from tests.support.checkpoints import llama, random_arrays, read_arrays, write_checkpoint
from tests.support.deepspeed_world import run_world

pytestmark = pytest.mark.timeout(1800)
CONFIG = llama(num_layers=2, hidden_size=20, num_heads=4, num_kv_heads=2, head_dim=6, ffn_size=22, vocab_size=37)
TAG = "global_step2"
RUNS = {  # name: (ranks, stage, dtype, further options); no size divides by 3, and small groups cut the model
    "one": (1, 2, "fp32", {}),
    "stage1": (3, 1, "bf16", {}),
    "stage2": (3, 2, "fp32", {}),
    "stage3": (3, 3, "fp32", {"sub_group_size": 700}),
    "stage3-bf16": (3, 3, "bf16", {"persistence": 100}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    write_checkpoint(folder / "hf", CONFIG, random_arrays(CONFIG), "hf")
    for world in (1, 3):
        cases = []
        for name, (ranks, stage, dtype, more) in RUNS.items():
            if ranks == world:
                place = {"config": str(folder / "hf"), "save": str(folder / name), "tag": TAG}
                cases.append({"stage": stage, "dtype": dtype, **place, **more})
        run_world(world, cases, folder)
    for name in RUNS:
        shutil.copy(folder / "hf" / "config.json", folder / name)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            to_universal(folder / name / TAG, folder / f"{name}.theirs" / TAG)
        (folder / f"{name}.theirs" / "latest_universal").write_text(TAG)
        shutil.copy(folder / "hf" / "config.json", folder / f"{name}.theirs")
        with open_source(folder / name) as source:
            plan = plan_conversion(source, layout=Layout(format="ds_universal"), optimizer=True)
            execute(plan, folder / f"{name}.ours", source=source)
    return folder


def to_universal(source, target):
    from deepspeed.checkpoint import ds_to_universal

    args = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=False,
        inject_missing_state=True,
    )
    target.mkdir(parents=True)
    ds_to_universal.main(args)


def by_name(arrays, kind=""):
    names = {tensor.name: tensor.parts[0].name for tensor in physical_tensors(ROWS["llama"], CONFIG)}
    return {name: arrays[f"{kind}:{canonical}" if kind else canonical] for name, canonical in names.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
class TestDeepSpeed:
    def test_weights_equal_zero_to_fp32(self, folder, name):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            expected = get_fp32_state_dict_from_zero_checkpoint(str(folder / name))
        with open_source(folder / name) as source:
            assert (source.format, source.details["stage"]) == ("ds_zero", RUNS[name][1])
            found = by_name(read_arrays(source))
        assert found.keys() == expected.keys()
        for key, values in found.items():
            np.testing.assert_array_equal(values, expected[key].detach().numpy(), err_msg=key)

    def test_universal_files_equal_ds_to_universal(self, folder, name):
        ours, theirs = (folder / f"{name}.{whose}" / TAG / "zero" for whose in ("ours", "theirs"))
        assert sorted(entry.name for entry in ours.iterdir()) == sorted(entry.name for entry in theirs.iterdir())
        for file in sorted(theirs.glob("*/*.pt")):
            expected = torch.load(file, weights_only=False)
            found = torch.load(ours / file.relative_to(theirs), weights_only=True)
            if file.name == "step.pt":
                assert float(found) == float(expected) == 2
                continue
            expected = expected["param"] if isinstance(expected, dict) else expected
            assert torch.equal(found["param"].flatten(), expected.flatten()), file

    def test_their_universal_files_are_read(self, folder, name):
        with open_source(folder / name) as source:
            expected = read_arrays(source, optimizer=True)
        for whose in ("theirs", "ours"):
            with open_source(folder / f"{name}.{whose}") as source:
                assert source.format == "ds_universal"
                found = read_arrays(source, optimizer=True)
            assert found.keys() == expected.keys()
            for key, values in found.items():
                np.testing.assert_array_equal(values, expected[key], err_msg=key)


@pytest.mark.slow
def test_deepspeed_resumes_from_ours_as_from_its_own(folder):
    """Two more steps on two ranks; and a student made of fp32 weights alone starts with the loss it should."""
    from transformers import AutoModelForCausalLM

    with open_source(folder / "hf") as source:
        plan = plan_inheritance(source, layers=[1], layout=Layout(format="ds_universal"))
        execute(plan, folder / "student", source=source)
    cases = []
    for name in ("stage1", "stage3"):
        _, stage, dtype, more = RUNS[name]
        for whose in ("ours", "theirs"):
            place = {"config": str(folder / "hf"), "load": str(folder / f"{name}.{whose}"), "tag": TAG}
            losses = str(folder / f"{name}.{whose}.losses")
            cases.append({"stage": stage, "dtype": dtype, "first": 2, "losses": losses, **place, **more})
    student = {"config": str(folder / "student"), "load": str(folder / "student"), "tag": "global_step0", "steps": 1}
    cases += [
        {"stage": stage, "dtype": "fp32", "losses": str(folder / f"student{stage}"), **student} for stage in (2, 3)
    ]
    run_world(2, cases, folder)
    for name in ("stage1", "stage3"):
        ours, theirs = (ast.literal_eval((folder / f"{name}.{w}.losses").read_text()) for w in ("ours", "theirs"))
        assert ours == theirs
        assert len(ours) == 2
    with open_source(folder / "student") as source:
        execute(plan_conversion(source), folder / "student.hf", source=source)
    model = AutoModelForCausalLM.from_pretrained(folder / "student.hf", attn_implementation="eager")
    expected = 0.0
    for rank in range(2):
        tokens = torch.randint(0, 37, (1, 8), generator=torch.Generator().manual_seed(rank))
        with torch.no_grad():
            expected += model(input_ids=tokens, labels=tokens).loss.item() / 2
    for stage in (2, 3):
        (loss,) = ast.literal_eval((folder / f"student{stage}").read_text())
        assert loss == pytest.approx(expected, abs=1e-6)
