import pytest

from megatron_inherit.base.errors import UsageError
from megatron_inherit.study.layers import require_words, resolve


@pytest.mark.parametrize(
    ("text", "depth", "blocks"),
    [
        ("first:2", 8, (0, 1)),
        ("middle:4", 8, (2, 3, 4, 5)),
        ("middle:3", 8, (2, 3, 4)),
        ("spaced:4", 8, (0, 2, 5, 7)),
        ("spaced:8", 8, tuple(range(8))),
        ("spaced:1", 8, (0,)),
        ("spaced:2", 30, (0, 29)),
        ("first:13/26", 8, (0, 1, 2, 3)),
        ("first:4/26", 8, (0,)),
        ("first:4/26", 2, (0,)),
        ("first:20/26", 26, tuple(range(20))),
        ("last:1/2", 6, (3, 4, 5)),
        ("0,1,0,1", 8, (0, 1, 0, 1)),
    ],
)
def test_words_for_blocks(text, depth, blocks):
    assert resolve(text, "nowhere", depth) == blocks


@pytest.mark.parametrize("text", ["middle:9", "spaced:0", "first:3/0", "outer:3", "first:27/26"])
def test_words_that_ask_for_too_much(text):
    with pytest.raises(UsageError):
        resolve(text, "nowhere", 8)


@pytest.mark.parametrize(
    "text", ["first:13/26", "middle:4", "spaced:1/2", "auto:ppl:4", "auto:angular:13/26", "0-7,3", "all"]
)
def test_words_that_some_model_could_satisfy(text):
    require_words(text)


@pytest.mark.parametrize("text", ["first:x", "middle:0", "auto:magic:4", "auto:ppl:0", "auto:ppl", "first:3/0", "0,-1"])
def test_words_that_no_model_could_satisfy(text):
    with pytest.raises(UsageError):
        require_words(text)
