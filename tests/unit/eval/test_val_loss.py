import math

import numpy as np
import pytest

from megatron_inherit.base.errors import DataError
from megatron_inherit.eval.val_loss import difference_stderr, summarize


def test_equal_windows_give_the_plain_mean_and_standard_error():
    rng = np.random.default_rng(0)
    per_token = rng.normal(3.0, 0.5, size=400)
    figures = summarize([10 * float(x) for x in per_token], [10] * 400, num_bytes=16000)
    assert figures.loss == pytest.approx(per_token.mean(), rel=1e-12)
    assert figures.stderr == pytest.approx(per_token.std(ddof=1) / math.sqrt(400), rel=1e-9)
    assert figures.perplexity == pytest.approx(math.exp(per_token.mean()))
    assert figures.bits_per_byte == pytest.approx(10 * per_token.sum() / math.log(2) / 16000)
    assert figures.windows == 400


def test_windows_weigh_by_their_tokens_and_the_error_covers_resampling():
    rng = np.random.default_rng(1)
    counts = rng.integers(5, 200, size=3000)
    sums = counts * rng.normal(2.0, 0.3, size=3000)
    whole = summarize(sums.tolist(), counts.tolist(), None)
    assert whole.loss == pytest.approx(sums.sum() / counts.sum())
    assert whole.bits_per_byte is None
    draws = [rng.choice(3000, size=3000) for _ in range(300)]
    spread = np.std([sums[d].sum() / counts[d].sum() for d in draws])
    assert whole.stderr == pytest.approx(spread, rel=0.15)


def test_a_single_window_has_no_error_and_no_tokens_are_refused():
    assert summarize([5.0], [2], 10).stderr is None
    assert summarize([1e6], [1], 10).perplexity == math.inf
    with pytest.raises(DataError, match="predict no token"):
        summarize([0.0], [0], 10)
    with pytest.raises(DataError, match="differ in number"):
        summarize([0.0], [1, 2], 10)


def test_paired_difference_is_sharper_than_two_separate_errors():
    rng = np.random.default_rng(2)
    difficulty = rng.normal(300, 60, size=200)
    first, second = difficulty + rng.normal(1, 1, 200), difficulty
    gap, error = difference_stderr(first.tolist(), second.tolist(), [100] * 200)
    assert gap == pytest.approx(0.01, abs=4 * error)
    assert error < summarize(first.tolist(), [100] * 200, None).stderr / 20
