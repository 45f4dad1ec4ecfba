"""Check A8: parameters of published parents and of their students, as whole numbers against the closed form."""

import dataclasses

import pytest

from megatron_inherit.arch.counts import count_parameters, peak_flops
from megatron_inherit.arch.presets import preset

VOCAB = 50304
BARE = {"vocab_size": VOCAB, "qkv_bias": False, "out_bias": False, "mlp_bias": False, "norm_bias": False}
"""The published GPT-2 runs pad the vocabulary and have no biases."""


def closed_form(layers, width, positions=1024):
    return 12 * layers * width**2 + VOCAB * width + positions * width + (2 * layers + 1) * width


@pytest.mark.parametrize(
    ("name", "width", "parent", "child", "millions", "saved"),
    [
        ("gpt2-medium", 1024, 24, 16, (354.5, 253.9), 28.4),
        ("gpt2-large", 1280, 36, 18, (773.5, 419.6), 45.8),
        ("gpt2-xl", 1600, 48, 24, (1556.7, 819.4), 47.4),
    ],
)
def test_gpt2(name, width, parent, child, millions, saved):
    config = dataclasses.replace(preset(name), **BARE)
    counts = [count_parameters(config.with_layers(layers)) for layers in (parent, child)]
    assert counts == [closed_form(layers, width) for layers in (parent, child)]
    norms = [(2 * layers + 1) * width for layers in (parent, child)]
    rounded = [round((count - norm) / 1e6, 1) for count, norm in zip(counts, norms, strict=True)]
    assert rounded == list(millions), "the rounded figures leave the norms out"
    assert round(100 * (1 - counts[1] / counts[0]), 1) == saved


def test_openllama_3b():
    width, inner, vocab = 3200, 8640, 32000
    config = preset("openllama-3b")
    counts = [count_parameters(config.with_layers(layers)) for layers in (26, 13)]
    expected = [
        layers * (4 * width**2 + 3 * width * inner + 2 * width) + 2 * vocab * width + width for layers in (26, 13)
    ]
    assert counts == expected
    assert [round(count / 1e9, 2) for count in counts] == [3.43, 1.82]
    assert round(count_parameters(config.with_layers(13), embeddings=False) / 1e9, 2) == 1.61


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L4", None),
    ],
)
def test_a_device_has_the_peak_of_its_own_form(device, peak):
    assert peak_flops(device) == peak
