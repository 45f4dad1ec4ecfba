import pytest

from megatron_inherit.base.errors import UsageError
from megatron_inherit.inherit.select import parse_layers, parse_roles


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("first:3", [0, 1, 2]),
        ("last:2", [4, 5]),
        ("every:2", [0, 2, 4]),
        ("every:4", [0, 4]),
        ("all", [0, 1, 2, 3, 4, 5]),
        ("0-3", [0, 1, 2, 3]),
        ("3-1", [3, 2, 1]),
        ("5, 0,2,2", [5, 0, 2, 2]),
        ("0-1,1,4-5", [0, 1, 1, 4, 5]),
    ],
)
def test_layers(text, layers):
    assert parse_layers(text, 6) == tuple(layers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("first:0", "selects no layer"),
        ("every:0", "selects no layer"),
        ("first:-2", "selects no layer"),
        ("first:7", "more layers than the teacher has"),
        ("0,6", "layer 6"),
        ("", "not understood"),
        ("1;2", "not understood"),
        ("first:2.5", "not understood"),
        ("0-99999999", "not understood"),
    ],
)
def test_bad_layers_are_refused_with_an_example(text, words):
    with pytest.raises(UsageError, match=words) as error:
        parse_layers(text, 6)
    assert error.value.exit_code == 2


def test_roles():
    assert parse_roles(["head,embed", "mlp"]) == ("embed", "mlp", "head")
    assert parse_roles([]) == ()
    assert len(parse_roles(["all"])) == 7
    with pytest.raises(UsageError, match=r"unknown role 'norms'.*final_norm"):
        parse_roles(["norms"])
