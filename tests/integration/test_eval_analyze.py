"""Check A11, and measurements of whole models against plain ones."""

import json
import math

import pytest
import torch

from megatron_inherit.base.errors import CheckpointError, DataError, UsageError
from megatron_inherit.cli.main import main
from megatron_inherit.eval import attention_rank, blocks, importance
from megatron_inherit.eval.calibration import sample_windows
from megatron_inherit.eval.hf_folder import load_model, load_tokenizer
from tests.support.tiny_hf import tiny_gpt2, tiny_llama

IDENTITY = 2


def silence(folder):
    """Makes a block the identity: nothing leaves its attention and its MLP."""
    model = load_model(folder)
    block = blocks.blocks_of(model)[IDENTITY]
    for name, parameter in block.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2])
def folder(request, tmp_path_factory):
    return silence(request.param(tmp_path_factory.mktemp("model") / "tiny"))


def test_an_identity_block_is_found_by_every_measure(folder):
    found = importance.measure_importance(folder, sequences=4, tokens=48, removal=True)
    assert found.block_influence[IDENTITY] <= 1e-6
    assert found.angular[0][IDENTITY] <= 1e-3
    assert found.removal_loss[IDENTITY] == found.loss
    others = [block for block in range(4) if block != IDENTITY]
    assert all(found.block_influence[block] > 1e-3 for block in others)
    scores = found.to_json()
    for metric in ("block-influence", "angular"):
        assert importance.select_layers(metric, 3, scores) == (0, 1, 3)
    assert min(abs(found.removal_loss[block] - found.loss) for block in others) > 0


def test_removing_an_identity_block_leaves_the_logits_bitwise(folder):
    model = load_model(folder)
    ids = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        with blocks.without_block(model, IDENTITY):
            assert torch.equal(model(ids).logits, whole)
        with blocks.without_block(model, 0):
            assert not torch.equal(model(ids).logits, whole)
        assert torch.equal(model(ids).logits, whole)


def test_attention_figures_equal_those_of_the_models_own_maps(folder):
    found = attention_rank.measure_attention(folder, sequences=5, tokens=24, batch=2)
    model = load_model(folder, attn_implementation="eager")
    windows = sample_windows(load_tokenizer(folder), None, sequences=5, tokens=24)
    with torch.no_grad():
        maps = torch.stack(model(windows, output_attentions=True).attentions)
    ranks = attention_rank.approximate_rank(maps).double().mean(dim=1)
    assert torch.allclose(torch.tensor(found.rank, dtype=torch.float64), ranks)
    assert found.max_rank == pytest.approx(ranks.max(dim=1).values.tolist())
    masses = attention_rank.mass(maps).double().mean(dim=(1, 2))
    assert found.avg_mass == pytest.approx(masses.tolist())
    assert torch.allclose(torch.tensor(found.sink), maps[..., 0].mean(dim=(1, 3)), atol=1e-6)


def test_one_blocks_maps_at_a_time_are_alive(folder, monkeypatch):
    import weakref

    alive, most = weakref.WeakSet(), []
    plain = attention_rank.approximate_rank

    def counting(maps, tau):
        alive.add(maps)
        most.append(len(alive))
        return plain(maps, tau)

    monkeypatch.setattr(attention_rank, "approximate_rank", counting)
    attention_rank.measure_attention(folder, sequences=4, tokens=16, batch=2)
    assert len(most) == 2 * 4
    assert max(most) <= 1


def test_a_model_without_maps_is_refused(folder):
    model = load_model(folder, attn_implementation="sdpa")
    with (
        torch.no_grad(),
        blocks.watch_attention(model, lambda *_: None),
        pytest.raises(CheckpointError, match="no attention maps"),
    ):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_block_influence_equals_a_plain_computation(folder):
    found = importance.measure_importance(folder, sequences=3, tokens=20)
    model = load_model(folder)
    windows = sample_windows(load_tokenizer(folder), None, sequences=3, tokens=20)
    seen = []
    with torch.no_grad(), blocks.watch_blocks(model, lambda block, before, after: seen.append((block, before, after))):
        model(windows)
    for block, before, after in seen:
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        assert found.block_influence[block] == pytest.approx(float((1 - cosine).mean()), abs=1e-9)
    hidden = [seen[0][1], *(after for _, _, after in seen)]
    cosine = torch.nn.functional.cosine_similarity(hidden[1][:, -1].double(), hidden[3][:, -1].double(), dim=-1)
    assert found.angular[1][1] == pytest.approx(float((torch.arccos(cosine) / math.pi).mean()), abs=1e-6)
    assert math.isnan(found.angular[1][3])


def test_choices_by_each_measure():
    scores = {
        "max_rank": [3.0, 9.0, 8.0, 1.0, 8.5],
        "block_influence": [0.9, 0.1, 0.2, 0.05, 0.3],
        "removal_loss": [9.0, 3.0, 3.5, 3.1, 8.0],
        "angular": [[0.5, 0.1, 0.2, 0.3, 0.4], [0.5, 0.3, 0.15, 0.4, None], *[[0.9] * 5] * 3],
    }
    assert importance.select_layers("attention-rank", 2, scores) == (1, 2)
    assert importance.select_layers("block-influence", 3, scores) == (0, 2, 4)
    assert importance.select_layers("ppl", 3, scores) == (0, 2, 4)
    assert importance.select_layers("angular", 4, scores) == (0, 2, 3, 4)
    assert importance.select_layers("angular", 3, scores) == (0, 1, 4)
    assert importance.select_layers("angular", 5, scores) == (0, 1, 2, 3, 4)
    with pytest.raises(UsageError, match="1 to 5"):
        importance.select_layers("ppl", 6, scores)
    with pytest.raises(UsageError, match="no measure"):
        importance.select_layers("magic", 2, scores)
    with pytest.raises(UsageError, match="hold no ppl"):
        importance.select_layers("ppl", 2, {})


@pytest.mark.slow
def test_the_commands_write_their_json_and_figures_and_choose_layers(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    common = [str(folder), "--sequences", "4", "--out", str(tmp_path)]
    assert main(["analyze", "attention", *common, "--tokens", "16"]) == 0
    assert main(["analyze", "importance", *common, "--removal"]) == 0
    assert "loss of the whole model" in capsys.readouterr().out
    figures = {"rank", "mass", "sink", "layers", "influence", "angular", "removal"}
    assert {path.stem for path in tmp_path.glob("*.png")} == figures
    assert json.loads((tmp_path / "attention.json").read_text())["sequences"] == 4
    words = ["inherit", str(folder), str(tmp_path / "student"), "--layers", "auto:block-influence:3"]
    assert main(words) == 0
    assert json.loads((tmp_path / "student" / "inherit.json").read_text())["plan"]["layer_map"] == [0, 1, 3]
    assert main(["inherit", str(folder), str(tmp_path / "x"), "--layers", "auto:magic:3"]) == 2
    assert main(["inherit", str(folder), str(tmp_path / "x"), "--layers", "auto:angular:9"]) == 2
    assert not (tmp_path / "x").exists()


def test_texts_are_read_cut_and_refused(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} "}) + "\n" for n in range(40)))
    windows = sample_windows(tokenizer, tmp_path / "text.jsonl", sequences=3, tokens=10)
    assert windows.shape == (3, 10)
    assert tokenizer.decode(windows[0]) == "line 0 lin"
    assert sample_windows(tokenizer, None, sequences=1, tokens=5).shape == (1, 5)
    with pytest.raises(DataError, match="too short"):
        sample_windows(tokenizer, tmp_path / "text.jsonl", sequences=300, tokens=10)
    with pytest.raises(DataError):
        sample_windows(tokenizer, tmp_path / "none.txt", sequences=3, tokens=10)
