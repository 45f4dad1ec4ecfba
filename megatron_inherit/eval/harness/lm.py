"""The one lm-eval adapter: any function from tokens to logits, of a transformers model or of an engine.

On an engine every process makes the same calls in the same order, so that tensor parallelism and ZeRO-3 gather as in
training. Only imported where lm-eval is installed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_inherit.base.errors import DataError, DivergedError, UsageError

Logits = Callable[[torch.Tensor], torch.Tensor]
Reduce = Callable[[Sequence[float]], "list[float]"]
Request = tuple[Any, list[int], list[int]]
Tokens = tuple[int, ...]
LARGEST_BATCH = 1 << 15
LONGEST_WINDOW = 2048
LOGITS_BYTES = 1 << 30


@dataclass(frozen=True)
class Share:
    """Which part of the requests this process scores; without one it scores all.

    Attributes:
        rank, size: Of the replicas of the model; all ranks of one replica have the same.
        reduce: Adds numbers over the replicas, the same result on every rank.
    """

    rank: int
    size: int
    reduce: Reduce


def window_of(max_positions: int | None) -> int:
    """Gives the tokens of the longest window that a model is scored on."""
    return min(max_positions or LONGEST_WINDOW, LONGEST_WINDOW)


def batch_tokens_of(vocab_size: int) -> int:
    """Chooses the tokens of a batch beside a model in training: its logits, held three times in fp32, get 1 GiB."""
    return max(256, min(8192, LOGITS_BYTES // (3 * 4 * vocab_size)))


class LogitsModel(TemplateLM):
    """Scores continuations.

    Args:
        logits: Maps int64 tokens [batch, sequence] to logits [batch, sequence, vocabulary]; causal, so that padding on
            the right changes nothing before it.
        tokenizer: Of transformers.
        max_length: Longest window in tokens; longer contexts lose their beginning.
        batch_tokens: Tokens of a batch; halved for good when the device of a process alone runs out of memory.
        share: Replicas among which the requests are shared out.
    """

    def __init__(
        self,
        logits: Logits,
        tokenizer: Any,
        *,
        max_length: int,
        batch_tokens: int = LARGEST_BATCH,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        self.logits, self.tokenizer = logits, tokenizer
        self.max_length, self.batch_tokens, self.share = max_length, batch_tokens, share

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokenizer.eos_token_id or 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encodes with the tokenizer's own habit about a leading token."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts in windows that follow each other, each token once."""
        windows: list[Request] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pieces = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, target in map(make_disjoint_window, pieces):
                windows.append((None, context, target))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Is not offered: an engine has no key-value cache."""
        raise UsageError(
            "Tasks that generate text are not supported.", fix="Export the model and use lm-eval's own CLI."
        )

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Scores (context, continuation) pairs; equal inputs, as those of one-token choices, run once.

        Raises:
            DivergedError: A score is no number: the best of such would be the first choice, and look like a result.
            DataError: A continuation is longer than the window, so that only its end could be scored.
        """
        longest = max((len(target) for *_, target in requests), default=0)
        if longest > self.max_length:
            raise DataError(
                f"An answer of {longest} tokens is longer than the model's window of {self.max_length}.",
                fix="Leave the task out, or take a model with more positions.",
            )
        inputs: dict[Tokens, list[int]] = defaultdict(list)
        for number, (_unused, context, target) in enumerate(requests):
            inputs[tuple((context + target)[-(self.max_length + 1) :][:-1])].append(number)
        queue = sorted(inputs, key=len, reverse=True)
        if self.share is None:
            answers = self._alone(queue, inputs, requests)
        else:
            answers = self._shared(queue, inputs, requests, self.share)
        if any(math.isnan(score) for score, _ in answers):
            raise DivergedError(
                "The model's logits are no numbers, so that nothing can be scored.",
                fix="Take an earlier checkpoint, or fp32 for weights whose activations exceed fp16's range.",
            )
        return answers

    def _alone(
        self, queue: Sequence[Tokens], inputs: Mapping[Tokens, Sequence[int]], requests: Sequence[Request]
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        while queue:
            batch = queue[: max(1, self.batch_tokens // len(queue[0]))]
            rows = self._rows(batch)
            if rows is None:
                self.batch_tokens = max(1, len(batch) * len(batch[0]) // 2)
                continue
            queue = queue[len(batch) :]
            for tokens, row in zip(batch, rows, strict=True):
                for number in inputs[tokens]:
                    answers[number] = _score(row[: len(tokens)], requests[number][2])
        return answers

    def _shared(
        self,
        queue: Sequence[Tokens],
        inputs: Mapping[Tokens, Sequence[int]],
        requests: Sequence[Request],
        share: Share,
    ) -> list[tuple[float, bool]]:
        """Scores this replica's part and adds the parts up; one without a batch left runs along on another's.

        The ranks of some engines must run forward passes together.
        """
        found = np.zeros((2, len(requests)))
        while queue:
            count = max(1, self.batch_tokens // len(queue[0]))
            mine, queue = queue[: count * share.size][count * share.rank :][:count], queue[count * share.size :]
            last = mine or [next(iter(inputs))]
            with torch.no_grad():
                rows = self.logits(_padded(last))
            for tokens, row in zip(mine, rows, strict=False):
                for number in inputs[tokens]:
                    found[:, number] = _score(row[: len(tokens)], requests[number][2])
        added = share.reduce(found.reshape(-1).tolist())
        return [
            (score, greedy > 0) for score, greedy in zip(added[: len(requests)], added[len(requests) :], strict=True)
        ]

    def _rows(self, batch: Sequence[tuple[int, ...]]) -> torch.Tensor | None:
        """Runs the model on a batch, or gives None where it does not fit the device and can be cut."""
        try:
            with torch.no_grad():
                return self.logits(_padded(batch))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            return None


def _padded(batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
    padded = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
    for row, tokens in zip(padded, batch, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return padded


def _score(logits: torch.Tensor, target: Sequence[int]) -> tuple[float, bool]:
    """Gives the log-probability of the target, whose last token follows the last row, and whether it is greedy."""
    wanted = torch.tensor(target[-len(logits) :], device=logits.device)
    scores = torch.log_softmax(logits[-len(wanted) :].float(), dim=-1)
    greedy = bool((scores.argmax(dim=-1) == wanted).all())
    return float(scores.gather(1, wanted[:, None]).sum()), greedy


def hf_logits(model: Any) -> Logits:
    """Makes the function of a transformers model."""
    return lambda tokens: model(tokens.to(model.device)).logits


def engine_logits(engine: Any, *, multiple: int = 1, pipeline_size: int = 1) -> Logits:
    """Makes the function of an engine's model.

    Args:
        engine: All ranks call the function together.
        multiple: Sequences are padded to a multiple of this, for engines that cut them.
        pipeline_size: Stages of the pipeline.

    Raises:
        UsageError: The model is cut into pipeline stages.
    """
    if pipeline_size > 1:
        raise UsageError(
            "Tasks cannot be scored during training with a pipeline.",
            fix="Set parallel.pp=1, or run 'minherit evaluate' on the saved checkpoints.",
        )

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.size(1)
        return engine.logits(torch.nn.functional.pad(tokens, (0, -length % multiple)))[:, :length]

    return logits
