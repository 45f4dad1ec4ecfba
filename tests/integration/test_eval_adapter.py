"""Our lm-eval adapter against lm-eval's own, alone and with its requests shared out, and what it refuses."""

import contextlib
import json

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval")

import torch

from megatron_inherit.base.errors import DataError, DivergedError
from megatron_inherit.cli.main import main
from megatron_inherit.eval.harness import readers
from megatron_inherit.eval.harness.lm import LogitsModel, Share, hf_logits
from megatron_inherit.eval.hf_folder import load_model, load_tokenizer
from tests.support.run_folders import write_run
from tests.support.tiny_hf import tiny_llama

PAIRS = [
    ("a question:", " yes"),
    ("a question:", " no"),
    ("ends in spaces  ", "and goes on"),
    ("", "no context"),
    ("x", " is shorter"),
    ("much longer than the window of sixteen tokens", " cut"),
    ("two", " lines\nand a\t"),
]
TEXTS = ["short", "a text of several windows, which follow each other without a gap", "\u00fcn\u00efcode"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=words, idx=n) for n, words in enumerate(arguments)]


def scores_of(model):
    pairs = model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    rolling = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    return [score for score, _ in pairs] + model.loglikelihood_rolling(rolling, disable_tqdm=True), [
        greedy for _, greedy in pairs
    ]


def start_token(tokenizer):
    """Lets a tokenizer put its ``<eos>`` before every text, as LLaMA's puts its ``<s>``."""
    from tokenizers import processors

    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 256)]
    )
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("leading", [False, True], ids=["no start token", "start token"])
@pytest.mark.parametrize("window", [16, 128])
def test_scores_are_those_of_lm_evals_own_adapter(folder, window, leading):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(folder), load_tokenizer(folder)
    tokenizer = start_token(tokenizer) if leading else tokenizer
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=2, device="cpu")
    ours = LogitsModel(hf_logits(model), tokenizer, max_length=window)
    (found, greedy), (wanted, wanted_greedy) = scores_of(ours), scores_of(theirs)
    assert found == pytest.approx(wanted, abs=2e-4)
    assert greedy == wanted_greedy


@pytest.mark.parametrize("size", [2, 3, 5])
def test_replicas_that_share_the_requests_out_score_each_once(folder, size):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    pairs = [(None, [n % 3, *range(n % 5 + 1)], [7] * (n % 4 + 1)) for n in range(11)]
    alone = LogitsModel(hf_logits(model), tokenizer, max_length=16)._loglikelihood_tokens(pairs)
    parts, passes = [], []
    for rank in range(size):
        calls = []
        share = Share(rank, size, lambda values: parts.append(values) or values)
        logits = hf_logits(model)
        shared = LogitsModel(
            lambda tokens, seen=calls, run=logits: seen.append(len(tokens)) or run(tokens),
            tokenizer,
            max_length=16,
            batch_tokens=8,
            share=share,
        )
        shared._loglikelihood_tokens(pairs)
        passes.append(len(calls))
    assert len(set(passes)) == 1, "ranks run their forward passes together"
    added = [sum(values) for values in zip(*parts, strict=True)]
    assert added[: len(pairs)] == pytest.approx([score for score, _ in alone], abs=1e-4)
    assert [value > 0 for value in added[len(pairs) :]] == [greedy for _, greedy in alone]


def test_an_answer_that_no_window_holds_is_refused_and_not_scored_in_part(folder):
    adapter = LogitsModel(hf_logits(load_model(folder)), load_tokenizer(folder), max_length=4)
    ((score, _),) = adapter._loglikelihood_tokens([(None, [1, 2, 3], [5] * 4)])
    assert score < 0
    with pytest.raises(DataError, match=r"An answer of 5 tokens.*window of 4"):
        adapter._loglikelihood_tokens([(None, [1, 2, 3], [5] * 5)])


def test_a_model_whose_logits_are_no_numbers_is_not_scored(folder):
    adapter = LogitsModel(
        lambda tokens: torch.full((*tokens.shape, 260), torch.nan), load_tokenizer(folder), max_length=16
    )
    with pytest.raises(DivergedError, match="nothing can be scored"):
        adapter._loglikelihood_tokens([(None, [1, 2], [3])])
    adapter.share = Share(0, 2, list)
    with pytest.raises(DivergedError):
        adapter._loglikelihood_tokens([(None, [1, 2], [3])])


def test_a_winograd_schema_reads_as_lm_eval_writes_it(tmp_path):
    from lm_eval.tasks.super_glue.wsc.preprocess_wsc import default_doc_to_text

    texts = ["It 's late , he said , and she did n't ( yet ) care . ", 'A " quote " of Bob \'s , he said .\tAnd so on.']
    for text in texts:
        target = {"span1_text": "Bob", "span1_index": 0, "span2_text": "he", "span2_index": text.split().index("he")}
        (tmp_path / "wsc.jsonl").write_text(json.dumps({"text": text, "target": target, "label": True}))
        (item,) = readers.read_items(tmp_path / "wsc.jsonl", {"reader": "superglue_wsc"})
        assert item["query"] == default_doc_to_text({"text": text, **target})


@pytest.mark.slow
def test_a_runs_results_are_kept_by_tasks_and_limit(folder, tmp_path, monkeypatch, capsys):
    from megatron_inherit.eval import hf_folder

    run = write_run(tmp_path / "run")
    rows = [{"query": f"Question {n}:", "choices": ["a", "b"], "gold": n % 2} for n in range(4)]
    for name in ("piqa", "copa"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = run / "checkpoints" / "step_00000060"
    monkeypatch.setattr(hf_folder, "as_hf_folder", lambda path: contextlib.nullcontext(folder))
    monkeypatch.setattr("megatron_inherit.cli.evaluate._weights_of", lambda path: str(checkpoint))
    for words in (["piqa"], ["copa"], ["piqa,copa"], ["piqa", "--limit", "2"]):
        assert main(["evaluate", str(run), "--data-dir", str(tmp_path), "--tasks", *words]) == 0
    found = {path.name: json.loads(path.read_text()) for path in (run / "evaluations").iterdir()}
    assert found.keys() == {"piqa.json", "copa.json", "piqa,copa.json", "piqa-first2.json"}
    assert found["piqa.json"]["weights"] == str(checkpoint)
    assert [found[name]["rows"][0]["items"] for name in ("piqa.json", "piqa-first2.json")] == [4, 2]
