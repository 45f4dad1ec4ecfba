"""The auxiliary as a model: what it computes, what its gradients are, what its descendants compute."""

import numpy as np
import pytest
import torch

from megatron_inherit.arch.presets import preset
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.inherit.inheritune import plan_fresh
from megatron_inherit.model.build import build_single
from megatron_inherit.model.load import load_chunk, random_reader, source_reader
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.execute import execute
from megatron_inherit.sharing.aux_model import count_unique, layers_of, share_stages, split_stages
from megatron_inherit.sharing.expand import place, plan_descendant
from megatron_inherit.sharing.learngene import plan_auxiliary
from megatron_inherit.sharing.probe import probe_placements
from megatron_inherit.sharing.stage_plan import contiguous, cycle, parse_plan, unshared
from megatron_inherit.sharing.tensors import by_first_layer, count_shared

pytestmark = pytest.mark.slow

PLAN = contiguous((2, 1, 3))


def tokens(rows=2, length=12):
    return torch.randint(0, 512, (rows, length + 1), generator=torch.Generator().manual_seed(1))


def shared_model(config, plan, dtype=torch.float32, std_seed=4):
    model = build_single(config, dtype=dtype)
    share_stages([model], plan)
    load_chunk(model, random_reader(config, std_seed))
    return model


def gradients(model, ids):
    model.zero_grad()
    model(ids[:, :-1], labels=ids[:, 1:]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("text", ["2,1,3", "cycle:3:2", "attn=3,3;mlp=6;norm=unshared:6"])
def test_a_shared_gradient_is_the_sum_over_its_uses(text, dtype, limit):
    plan = parse_plan(text)
    config = preset("llama-tiny").with_layers(6)
    model = shared_model(config, plan, dtype)
    copies = build_single(config, dtype=dtype)
    for (_, mine), (_, other) in zip(layers_of([model]), layers_of([copies]), strict=True):
        other.load_state_dict(mine.state_dict())
    for part in ("embedding", "output_layer"):
        getattr(copies, part).load_state_dict(getattr(model, part).state_dict())
    copies.decoder.final_layernorm.load_state_dict(model.decoder.final_layernorm.state_dict())
    shared, single = gradients(model, tokens()), gradients(copies, tokens())
    component = {"self_attention": "attn", "mlp": "mlp"}
    for name, gradient in shared.items():
        if ".layers." not in name:
            wanted = single[name]
        else:
            layer, inside = name.split(".layers.")[1].split(".", 1)
            ids = plan.ids(component.get(inside.split(".")[0], "norm"))
            uses = [i for i in range(6) if ids[i] == ids[int(layer)]]
            wanted = sum(single[f"decoder.layers.{i}.{inside}"].double() for i in uses)
        error = (gradient.double() - wanted.double()).norm() / wanted.double().norm()
        assert float(error) <= limit, name


def test_shared_parameters_are_stored_once():
    config = preset("llama-tiny").with_layers(6)
    for plan in (PLAN, cycle(2, 3), parse_plan("attn=3,3;mlp=6;norm=unshared:6")):
        assert count_unique([shared_model(config, plan)]) == count_shared(config, plan).unique


@pytest.fixture(scope="module")
def learngenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genes")
    made = {}
    for name in ("llama-tiny", "gpt2-tiny"):
        execute(plan_fresh(preset(name).with_layers(6), seed=3, std=0.2), folder / name / "teacher")
        with open_source(folder / name / "teacher") as source:
            execute(plan_auxiliary(source, PLAN, start="stepwise"), folder / name / "gene", source=source)
        made[name] = folder / name / "gene"
    return made


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_a_descendant_of_the_same_layout_gives_the_same_logits(tmp_path, learngenes, name):
    with open_source(learngenes[name]) as source:
        model = build_single(source.config)
        share_stages([model], PLAN)
        load_chunk(model, by_first_layer(source_reader(source, source.config), PLAN))
        stages = place(PLAN, 6, "proportional")
        execute(plan_descendant(source, stages), tmp_path / "child", source=source)
    with open_source(tmp_path / "child") as child:
        other = build_single(child.config)
        load_chunk(other, source_reader(child, child.config))
    ids = tokens()[:, :-1]
    with torch.no_grad():
        assert torch.equal(model(ids), other(ids))


@pytest.mark.parametrize(("name", "kind"), [("llama-tiny", "LlamaForCausalLM"), ("gpt2-tiny", "GPT2LMHeadModel")])
def test_a_descendant_is_an_ordinary_model_to_transformers(tmp_path, learngenes, name, kind):
    transformers = pytest.importorskip("transformers")
    with open_source(learngenes[name]) as source:
        execute(plan_descendant(source, place(PLAN, 9, "front")), tmp_path / "child", source=source)
        execute(plan_conversion(source), tmp_path / "whole", source=source)
        model = build_single(source.config)
        share_stages([model], PLAN)
        load_chunk(model, by_first_layer(source_reader(source, source.config), PLAN))
    ids = tokens()[:, :-1]
    child = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "child", dtype=torch.float32)
    assert type(child).__name__ == kind
    assert child.config.num_hidden_layers == 9
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    with torch.no_grad():
        assert float((whole(ids).logits - model(ids)).abs().max()) <= 1e-5
        for made in (child, whole):
            cached = made.generate(ids[:1], max_new_tokens=32, do_sample=False, use_cache=True, pad_token_id=0)
            plain = made.generate(ids[:1], max_new_tokens=32, do_sample=False, use_cache=False, pad_token_id=0)
            assert torch.equal(cached, plain)


def test_splitting_changes_nothing_but_what_is_shared():
    config = preset("llama-tiny").with_layers(8)
    model = shared_model(config, contiguous((8,)))
    ids = tokens()[:, :-1]
    with torch.no_grad():
        before = model(ids)
        for plan in (contiguous((4, 4)), contiguous((2, 2, 2, 2)), unshared(8)):
            split_stages([model], plan)
            assert torch.equal(model(ids), before)
            assert count_unique([model]) == count_shared(config, plan).unique


def test_a_stage_in_two_chunks_of_a_rank_is_refused():
    config = preset("llama-tiny").with_layers(4)
    first, second = build_single(config), build_single(config)
    for layer in second.decoder.layers:
        layer.layer_number += 4
    with pytest.raises(ConfigError, match="two chunks"):
        share_stages([first, second], contiguous((3, 5)))
    share_stages([build_single(config), second], contiguous((4, 4)))


def test_probing_scores_descendants_as_they_would_be(tmp_path, learngenes):
    windows = tokens(rows=4, length=16).numpy().astype(np.int64)
    with open_source(learngenes["llama-tiny"]) as source:
        stages = place(PLAN, 5, "back")
        losses = probe_placements(source, [stages, place(PLAN, 5, "front")], windows)
        execute(plan_descendant(source, stages), tmp_path / "child", source=source)
    with open_source(tmp_path / "child") as child:
        model = build_single(child.config)
        load_chunk(model, source_reader(child, child.config))
    rows = torch.from_numpy(windows)
    with torch.no_grad():
        mean = model(rows[:, :-1], labels=rows[:, 1:]) / (4 * 16)
    assert losses[stages] == pytest.approx(float(mean), abs=1e-6)
    assert len(set(losses.values())) == 2
