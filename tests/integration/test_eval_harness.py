"""lm-eval on local files: our reading of them, our adapter, and the results it writes."""

import json
import math
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval")

import torch
import yaml

from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.cli.main import main
from megatron_inherit.eval.harness import run, tasks
from megatron_inherit.eval.harness.lm import LogitsModel, engine_logits, hf_logits
from megatron_inherit.eval.hf_folder import load_model, load_tokenizer
from tests.support.tiny_hf import tiny_llama

CHOICES = [
    {"query": f"Question: what follows {n}?\n", "choices": [str(n + 1), str(n + 7), "nothing"], "gold": n % 3}
    for n in range(12)
]
SCHEMAS = [
    {
        "context_options": [f"The cat saw dog {n} so the cat", f"The cat saw dog {n} so the dog"],
        "continuation": "ran.",
        "gold": n % 2,
    }
    for n in range(8)
]
CLOZES = [{"context": f"one two {n} two one", "continuation": "two"} for n in range(6)]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def data(tmp_path):
    lines(tmp_path / "piqa.jsonl", CHOICES)
    lines(tmp_path / "winogrande.jsonl", SCHEMAS)
    lines(tmp_path / "lambada_openai.jsonl", CLOZES)
    (tmp_path / "wiki.test.raw").write_text(
        " \n = First = \n \n A page , of words . \n \n = Second = \n \n More @-@ words \n"
    )
    lines(
        tmp_path / "wsc.jsonl",
        [
            {
                "text": "Mark told Pete many lies about himself.",
                "target": {"span1_text": "Mark", "span1_index": 0, "span2_text": "himself.", "span2_index": 6},
                "label": True,
            }
        ],
    )
    (tmp_path / "MNLI").mkdir()
    (tmp_path / "MNLI" / "dev_matched.tsv").write_text(
        "index\tsentence1\tsentence2\tgold_label\n"
        '0\tA man "sleeps".\tHe rests\tentailment\n1\tIt rains\tIt is dry.\t-\n'
    )
    (tmp_path / "TruthfulQA.csv").write_text(
        "\ufeffType,Question,Correct Answers,Incorrect Answers\nx,Is it?,Yes; It is,No\nx,Was it?,No,Yes; Maybe; Once\n"
    )
    for split, number in (("dev", 5), ("test", 3)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        rows = "".join(f'"Is {n}, or not?",w{n},x{n},y{n},z{n},{"ABCD"[n % 4]}\n' for n in range(number))
        (tmp_path / "mmlu" / split / f"high_school_sums_{split}.csv").write_text(rows)
    return tmp_path


def scored(folder, name, data):
    model = run.hf_model(folder, device="cpu", dtype="fp32")
    return run.evaluate(model, [name], data_dir=data)


def log_probability(model, tokenizer, context, continuation):
    ids = tokenizer.encode(context)
    whole = torch.tensor([tokenizer.encode(context + continuation)])
    with torch.no_grad():
        scores = torch.log_softmax(model(whole).logits[0].double(), dim=-1)
    return sum(float(scores[at - 1, whole[0, at]]) for at in range(len(ids), whole.shape[1]))


@pytest.mark.slow
def test_scores_equal_a_plain_evaluation_of_the_model(folder, data):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    right = [0, 0, 0]
    for item in CHOICES:
        prompt = item["query"].strip() + "\nAnswer:"
        scores = [log_probability(model, tokenizer, prompt, " " + choice) for choice in item["choices"]]
        right[0] += scores.index(max(scores)) == item["gold"]
        norms = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
        right[1] += norms.index(max(norms)) == item["gold"]
    by_metric = {row.metric: row for row in scored(folder, "piqa", data)}
    assert by_metric["acc"].value == pytest.approx(right[0] / 12)
    assert by_metric["acc_norm"].value == pytest.approx(right[1] / 12)
    share = by_metric["acc"].value
    assert by_metric["acc"].stderr == pytest.approx(math.sqrt(share * (1 - share) / 11), abs=1e-6)

    for item in SCHEMAS:
        scores = [log_probability(model, tokenizer, context, " ran.") for context in item["context_options"]]
        right[2] += scores.index(max(scores)) == item["gold"]
    assert scored(folder, "winogrande", data)[0].value == pytest.approx(right[2] / 8)

    totals = [log_probability(model, tokenizer, item["context"], " two") for item in CLOZES]
    by_metric = {row.metric: row for row in scored(folder, "lambada_openai", data)}
    assert by_metric["perplexity"].value == pytest.approx(math.exp(-sum(totals) / 6), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_batches_padding_and_shared_inputs_change_nothing(folder, batch_tokens):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    adapter = LogitsModel(hf_logits(model), tokenizer, max_length=128, batch_tokens=batch_tokens)
    pairs = [
        ("a long context it is", " a"),
        ("a long context it is", " b"),
        ("short", " and longer answers"),
        ("x", " y"),
    ]
    requests = [((one, two), *adapter._encode_pair(one, two)) for one, two in pairs]
    for (score, _), (one, two) in zip(adapter._loglikelihood_tokens(requests), pairs, strict=True):
        assert score == pytest.approx(log_probability(model, tokenizer, one, two), abs=1e-4)


def test_a_device_without_memory_gets_smaller_batches(folder):
    model = load_model(folder)

    def tight(tokens):
        if tokens.numel() > 40:
            raise torch.OutOfMemoryError
        return model(tokens).logits

    adapter = LogitsModel(tight, load_tokenizer(folder), max_length=128, batch_tokens=1000)
    requests = [(None, [n, n + 1, n + 2], [5] * 6) for n in range(20)]
    free = LogitsModel(hf_logits(model), load_tokenizer(folder), max_length=128)
    expected = [score for score, _ in free._loglikelihood_tokens(requests)]
    assert [score for score, _ in adapter._loglikelihood_tokens(requests)] == pytest.approx(expected, abs=1e-4)
    assert adapter.batch_tokens <= 40


def test_a_long_text_is_scored_in_windows_each_token_once(folder):
    adapter = LogitsModel(hf_logits(load_model(folder)), load_tokenizer(folder), max_length=16)
    seen = []
    adapter._loglikelihood_tokens = lambda windows: [seen.append(w) or (float(len(w[2])), True) for w in windows]
    request = type("Request", (), {"args": ("x" * 50,)})()
    assert adapter.loglikelihood_rolling([request]) == [50.0]
    assert all(len(context) + len(target) <= 17 for _, context, target in seen)


def test_pipelines_are_refused_with_the_way_out():
    with pytest.raises(UsageError, match="minherit evaluate"):
        engine_logits(None, pipeline_size=2)


@pytest.mark.parametrize("name", ["wsc", "mnli", "truthfulqa_mc2", "mmlu", "wikitext"])
def test_other_forms_build_a_task_whose_requests_read_well(data, name):
    task = tasks.build_task(name, data)
    task.build_all_requests(rank=0, world_size=1)
    first = task.instances[0].args
    expected = {
        "wsc": "Passage: Mark told Pete many lies about *himself.*\nQuestion: In the passage above",
        "mnli": 'A man "sleeps".\nQuestion: He rests. True, False or Neither?\nAnswer:',
        "truthfulqa_mc2": "Q: What is human life expectancy in the United States?\n",
        "mmlu": "The following are multiple choice questions (with answers) about high school sums.\n\nIs 0, or not?\n",
        "wikitext": " = First =\n\nA page, of words.",
    }
    assert first[0].lstrip("\n").startswith(expected[name].lstrip("\n"))
    numbers = {"wsc": 2, "mnli": 3, "truthfulqa_mc2": 7, "mmlu": 12, "wikitext": 2}
    assert len(task.instances) == numbers[name]
    if name == "mmlu":
        assert first[0].count("Answer:") == 6
        assert first[0].endswith("D. z0\nAnswer:")
        assert first[1] == " A"


def test_wikitext_is_detokenized_as_everyone_does():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    page = " = A = \n\n \" He 's here \" , said ( she ) @-@ 1 @,@ 000 @.@ 5 ; [ x ] : y ! = = B = = \n ° N s ' . \n"
    assert tasks._detokenized({"page": page}) == wikitext_detokenizer({"page": page})


def test_true_answers_share_of_probability():
    share = tasks._truthfulqa_mass({"right": 2}, [(math.log(0.2), 0), (math.log(0.1), 0), (math.log(0.3), 0)])["acc"]
    assert share == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--suite", "nonsense"], 2, "There is no suite 'nonsense'"),
        ([], 2, "Give either --tasks or --suite"),
        (["--tasks", "piqua", "--data-dir", "DATA"], 2, "Did you mean 'piqa'?"),
        (["--tasks", "piqa", "--data-dir", "EMPTY"], 4, "piqa.jsonl"),
        (["--suite", "inheritune", "--data-dir", "EMPTY"], 4, "10 of 10 tasks are missing"),
        (["--tasks", "piqa", "--data-dir", "nowhere"], 4, "nowhere is not a folder"),
        (["--tasks", "piqa", "--batch-size", "many"], 2, "--batch-size"),
        (["--tasks", "lambada_openia"], 2, "Did you mean 'lambada_openai'?"),
        (["--tasks", "mmlu", "--data-dir", "DATA", "--shots", "3"], 2, "--shots is for lm-eval's own tasks"),
    ],
)
def test_wrong_requests_end_before_a_model_is_loaded(data, tmp_path_factory, capsys, words, code, message):
    places = {"DATA": str(data), "EMPTY": str(tmp_path_factory.mktemp("empty"))}
    assert main(["evaluate", "no-such-model", *(places.get(word, word) for word in words)]) == code
    assert message in capsys.readouterr().err


def test_the_suites_are_made_of_tasks_that_lm_eval_knows_by_these_names():
    known = set(run._manager(local=False).all_tasks)
    for name in ("inheritune", "inheritune-gpt2"):
        assert set(tasks.suite(name).tasks) <= known
    assert {task.get("lm_eval", name) for name, task in tasks.local_tasks().items()} - known <= {"commonsense_qa"}


def test_a_suite_has_its_shots_with_lm_evals_own_data_too():
    chosen = tasks.suite("inheritune")
    names = list(chosen.tasks)
    assert run._by_shots(names, chosen, None, local=False) == {None: names[:-1], 5: ["mmlu"]}
    assert run._by_shots(names, chosen, 2, local=False) == {2: names}
    assert run._by_shots(names, chosen, None, local=True) == {None: names}


@pytest.mark.slow
def test_groups_are_a_row_over_all_their_items_and_tags_name_their_tasks(folder, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    form = {
        "dataset_path": "json",
        "test_split": "test",
        "tag": ["toys"],
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for name, items in (("toy_a", CHOICES[:4]), ("toy_b", CHOICES[4:])):
        lines(tmp_path / f"{name}.jsonl", items)
        files = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "dataset_kwargs": files, **form}))
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "toy", "task": ["toy_a", "toy_b"], "aggregate_metric_list": aggregate}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(group))
    model = run.hf_model(folder, device="cpu", dtype="fp32")
    (alone,) = run.evaluate(model, run.plan_tasks([str(tmp_path / "toy_a.yaml")], None, None)[0])
    assert (alone.task, alone.items, alone.shots) == ("toy_a", 4, 0)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(run, "_manager", lambda local: manager)
    (whole,) = run.evaluate(model, ["toy"], shots=2)
    assert (whole.task, whole.metric, whole.items, whole.shots) == ("toy", "acc", 12, 2)
    both = run.evaluate(model, ["toys"])
    assert [(row.task, row.items, row.shots) for row in both] == [("toy_a", 4, 0), ("toy_b", 8, 0)]
    run.require_data(["toy"])


@pytest.mark.slow
def test_names_are_looked_up_without_the_network():
    program = """
from megatron_inherit.eval.harness.run import plan_tasks
plan_tasks(["piqa"], None, None)
import huggingface_hub.constants as hub
assert hub.HF_HUB_OFFLINE, "read when it is imported, with lm-eval"
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.slow
def test_data_that_lm_eval_has_not_got_is_said(folder, tmp_path, capsys):
    task = {"task": "toy", "dataset_path": "nobody/has-this-set", "test_split": "test", "doc_to_text": "{{a}}"}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**task, "doc_to_target": "b", "output_type": "loglikelihood"}))
    assert main(["evaluate", str(folder), "--tasks", str(tmp_path / "toy.yaml")]) == 4
    said = capsys.readouterr().err
    assert "lm-eval cannot get at the data of its tasks" in said
    assert "--data-dir" in said


def test_a_damaged_file_is_named(data):
    (data / "piqa.jsonl").write_text('{"query": "x"}\n')
    with pytest.raises(DataError, match=r"piqa\.jsonl does not have the form"):
        tasks.build_task("piqa", data)


def test_published_rows_carry_binomial_errors():
    chosen = tasks.suite("inheritune")
    assert len(chosen.tasks) == 10
    assert len(chosen.published) == 6
    assert all(set(values) == set(chosen.tasks) for values in chosen.published.values())
    assert chosen.error("boolq", 0.6168) == pytest.approx(0.0085, abs=1e-4)
    assert tasks.suite("inheritune-gpt2").error("wikitext", 34.84) is None


@pytest.mark.slow
def test_the_command_prints_a_table_beside_published_results(folder, data, tmp_path, capsys):
    out = tmp_path / "result.json"
    words = [
        "evaluate",
        str(folder),
        "--suite",
        "inheritune",
        "--data-dir",
        str(data),
        "--skip-missing",
        "--out",
        str(out),
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "Inheritune 1.5B (1B)" in shown
    assert "0.565 ± 0.012" in shown
    result = json.loads(out.read_text())
    assert {row["task"] for row in result["rows"]} == {"piqa", "winogrande", "wsc", "truthfulqa_mc2", "mnli", "mmlu"}
    assert next(row for row in result["rows"] if row["task"] == "mmlu")["shots"] == 5
    assert result["versions"]["lm-eval"]
