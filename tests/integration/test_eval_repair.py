"""Repairs are least-squares optima, cost no training, and the written student is the one that was measured."""

import json

import pytest
import torch

from megatron_inherit.cli.main import main
from megatron_inherit.eval import repair as repairs
from megatron_inherit.eval.calibration import sample_windows
from megatron_inherit.eval.cut import Cut
from megatron_inherit.eval.hf_folder import load_model, load_tokenizer
from megatron_inherit.eval.importance import mean_loss
from tests.support.tiny_hf import tiny_gpt2, tiny_llama


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2])
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("model") / "tiny", layers=6)


def windows_of(folder, number=12, tokens=64):
    return sample_windows(load_tokenizer(folder), None, sequences=number, tokens=tokens)


def test_a_gain_is_found_again_and_no_other_is_better():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    head = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    gain, bias = torch.rand(12, generator=generator).double() + 0.5, torch.randn(12, generator=generator).double()
    found, shift = repairs.fit_gain(x, x * gain + bias, head, bias=True)
    assert torch.allclose(found, gain, atol=5e-3)
    assert torch.allclose(shift, bias, atol=5e-3)

    y = torch.randn(400, 12, generator=generator, dtype=torch.float64) + x
    best, _ = repairs.fit_gain(x, y, head, bias=False)
    centred = head - head.mean(dim=0)

    def cost(gain):
        return float(((x * gain - y) @ centred.T).pow(2).sum())

    assert cost(best) < cost(torch.ones(12))
    for _ in range(20):
        assert cost(best) <= cost(best + 0.05 * torch.randn(12, generator=generator, dtype=torch.float64))


def test_a_map_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 300, 8, generator=generator, dtype=torch.float64)
    assert torch.allclose(repairs.fit_map(x, y), torch.linalg.lstsq(x, y).solution.T, atol=1e-3)


def test_a_cut_without_a_cut_is_the_teacher(folder):
    model, windows = load_model(folder), windows_of(folder, 3)
    whole = Cut(model, range(6))
    assert whole.loss(windows) == pytest.approx(mean_loss(model, windows), abs=1e-5)
    y = whole.teacher_states(windows)
    assert torch.allclose(
        whole.norm.weight * whole.student_states(windows) + (whole.norm.bias if whole.has_bias else 0), y, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods", ["final-norm", "affine", "keep-last:1,final-norm", "keep-last:2,block-scale,final-norm"]
)
def test_the_written_student_has_the_measured_loss(folder, tmp_path, methods):
    words = ["inherit", str(folder), str(tmp_path / "student"), "--layers", "first:4", "--repair", methods]
    assert main(words) == 0
    written = json.loads((tmp_path / "student" / "inherit.json").read_text())
    assert written["repair"]["methods"] == methods
    model, windows = load_model(tmp_path / "student"), windows_of(folder, 4)
    assert model.config.tie_word_embeddings == (
        load_model(folder).config.tie_word_embeddings and "affine" not in methods
    )

    fresh = repairs.fit_repair(folder, range(4), methods)  # what the command did
    cut = Cut(load_model(folder), fresh.layers)
    for place in range(4):
        factor = fresh.scales.get(f"layers.{place}.attn.o")
        if factor is not None:
            cut.scale_block(place, factor)
    cut.set_final_norm(fresh.tensors["final_norm.weight"], fresh.tensors.get("final_norm.bias"))
    cut.head = fresh.tensors.get("head.weight", cut.head)
    assert mean_loss(model, windows) == pytest.approx(cut.loss(windows), abs=1e-4)
    assert tuple(written["plan"]["layer_map"]) == fresh.layers


def test_the_fits_lower_the_logits_error_and_spare_the_teacher(folder):
    model, windows = load_model(folder), windows_of(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    errors = {}
    for name, refit in (("plain", None), ("norm", repairs.refit_final_norm), ("map", repairs.refit_head)):
        cut = Cut(model, range(3))
        x, y = cut.student_states(windows), cut.teacher_states(windows)
        target = (y @ cut.head.T).double()
        if refit:
            refit(cut, x, y, repairs.Repair((0, 1, 2)))
        bias = cut.norm.bias if cut.has_bias else 0
        logits = ((cut.norm.weight * x + bias) @ cut.head.T).double()
        errors[name] = float(
            (logits - logits.mean(-1, keepdim=True) - target + target.mean(-1, keepdim=True)).pow(2).mean()
        )
    assert errors["map"] < errors["norm"] < errors["plain"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_block_scale_touches_only_what_follows_a_gap(folder):
    fixed = repairs.fit_repair(folder, (0, 1, 3, 5), "block-scale", sequences=8, tokens=32)
    assert {name.split(".")[1] for name in fixed.scales} == {"1", "2", "3"}
    assert repairs.fit_repair(folder, range(6), "block-scale", sequences=8, tokens=32).scales == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repair", "magic"], "unknown method 'magic'"),
        (["--repair", "affine,final-norm"], "Take one of them"),
        (["--repair", "keep-last:9"], "at most 4"),
        (["--repair", "affine", "--reset", "norm"], "fits inherited weights"),
    ],
)
def test_wrong_repairs_end_before_anything_is_written(folder, tmp_path, capsys, words, message):
    assert main(["inherit", str(folder), str(tmp_path / "student"), "--layers", "first:4", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_no_gain_can_carry_does_not_blow_up(tmp_path):
    """LayerNorm leaves nothing along one direction: a map fitted to its output has no inverse there."""
    folder = tiny_gpt2(tmp_path / "tiny", layers=6)
    model, windows = load_model(folder), windows_of(folder, 16)
    cut = Cut(model, range(3))
    repair = repairs.Repair((0, 1, 2))
    repairs.refit_head(cut, cut.student_states(windows[4:]), cut.teacher_states(windows[4:]), repair)
    assert repair.tensors["final_norm.bias"].abs().max() < 10
