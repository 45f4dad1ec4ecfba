from megatron_inherit.arch.presets import preset
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.eval.layer_map import Origin, draw_map, join_ranges


def origins(layers, *, fresh=(), teacher_layers=6):
    config = preset("gpt2-tiny").with_layers(len(layers))
    for spec in enumerate_tensors(config):
        if spec.role in fresh:
            yield Origin(spec.name, "init", None)
        elif spec.layer is None:
            yield Origin(spec.name, "copy", spec.name)
        else:
            yield Origin(spec.name, "copy", spec.name.replace(f"layers.{spec.layer}.", f"layers.{layers[spec.layer]}."))


def test_ranges():
    assert join_ranges([0, 1, 2, 5, 5, 6]) == "0-2, 5, 5-6"
    assert join_ranges([]) == ""


def test_every_kept_block_is_linked_and_the_rest_is_dropped():
    drawing = draw_map(origins([0, 2, 4, 4]), teacher_layers=6)
    assert drawing.layers == (0, 2, 4, 4)
    assert drawing.summary == "blocks 0, 2, 4, 4 of 6"
    states = [box.state for box in drawing.boxes if box.x == 0 and box.text.isdigit()]
    assert states == ["kept", "dropped", "kept", "dropped", "kept", "dropped"]
    assert len(drawing.links) == 4 + 3  # embedding, positions and final norm as well
    assert all(box.y >= 0 and box.y + box.height <= drawing.height for box in drawing.boxes)


def test_a_partly_fresh_block_shows_its_parts():
    drawing = draw_map(origins([0, 1], fresh=("norm", "final_norm")), teacher_layers=6)
    parts = [(box.text, box.state) for box in drawing.boxes if box.title.startswith("block 0")]
    assert parts == [("norm", "fresh"), ("attn", "kept"), ("mlp", "kept")]
    assert any(box.title == "final norm: fresh" for box in drawing.boxes)
    assert drawing.layers == (0, 1)


def test_a_random_model_has_no_parent():
    drawing = draw_map(origins([0, 1], fresh=("attn", "mlp", "norm")), teacher_layers=6)
    assert drawing.layers == (None, None)
    assert drawing.summary == "no block"
