"""The one lm-eval adapter: any function from tokens to logits, of a transformers model or of an engine.

On an engine every process makes the same calls in the same order, so that tensor parallelism and ZeRO-3 gather as in
training. Only imported where lm-eval is installed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_inherit.base.errors import UsageError

Logits = Callable[[torch.Tensor], torch.Tensor]
Request = tuple[Any, list[int], list[int]]
LARGEST_BATCH = 1 << 15


class LogitsModel(TemplateLM):
    """Scores continuations.

    Args:
        logits: Maps int64 tokens [batch, sequence] to logits [batch, sequence, vocabulary]; causal, so that padding on
            the right changes nothing before it.
        tokenizer: Of transformers.
        max_length: Longest window in tokens; longer contexts lose their beginning.
        batch_tokens: Tokens of a batch; halved for good when a device runs out of memory.
    """

    def __init__(self, logits: Logits, tokenizer: Any, *, max_length: int, batch_tokens: int = LARGEST_BATCH) -> None:
        super().__init__()
        self.logits, self.tokenizer = logits, tokenizer
        self.max_length, self.batch_tokens = max_length, batch_tokens

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
        """Scores (context, continuation) pairs; equal inputs, as those of one-token choices, run once."""
        inputs: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_unused, context, target) in enumerate(requests):
            inputs[tuple((context + target)[-(self.max_length + 1) :][:-1])].append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        queue = sorted(inputs, key=len, reverse=True)
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

    def _rows(self, batch: Sequence[tuple[int, ...]]) -> torch.Tensor | None:
        """Runs the model on a batch, or gives None where it does not fit the device and can be cut."""
        padded = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        for row, tokens in zip(padded, batch, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        try:
            with torch.no_grad():
                return self.logits(padded)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            return None


def _score(logits: torch.Tensor, target: Sequence[int]) -> tuple[float, bool]:
    """Gives the log-probability of the target, whose last token follows the last row, and whether it is greedy."""
    wanted = torch.tensor(target[-len(logits) :], device=logits.device)
    scores = torch.log_softmax(logits[-len(wanted) :].float(), dim=-1)
    greedy = bool((scores.argmax(dim=-1) == wanted).all())
    return float(scores.gather(1, wanted[:, None]).sum()), greedy


def hf_logits(model: Any) -> Logits:
    """Makes the function of a transformers model."""
    return lambda tokens: model(tokens.to(model.device)).logits


def engine_logits(engine: Any, *, pipeline_size: int = 1) -> Logits:
    """Makes the function of an engine's model.

    Raises:
        UsageError: The model is cut into pipeline stages.
    """
    if pipeline_size > 1:
        raise UsageError(
            "Tasks cannot be scored during training with a pipeline.",
            fix="Set engine.pipeline_parallel to 1, or run 'minherit evaluate' on the saved checkpoints.",
        )
    return engine.logits
