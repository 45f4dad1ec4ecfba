"""``minherit data`` and ``tools/preprocess_data.py`` from text to samples, and their exit codes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_inherit.cli.main import main
from megatron_inherit.data.indexed import IndexedFile
from megatron_inherit.data.loader import LoaderOptions, open_loader
from megatron_inherit.data.manifests import TokensManifest
from megatron_inherit.data.prepare import make_windows, prepare
from megatron_inherit.data.tokenizer import open_tokenizer
from megatron_inherit.data.windows import EvalWindows
from tests.support.text_data import byte_level_folder, gpt2_folder, make_texts, write_jsonl

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture
def made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """text, tokens and a subset of two domains, made by the commands."""
    for number, domain in enumerate(("c4", "arxiv")):
        write_jsonl(tmp_path / "in" / f"{domain}_sample.jsonl", make_texts(100, seed=number))
    folder = byte_level_folder(tmp_path / "tokenizer")
    text, tokens, subset = (str(tmp_path / name) for name in ("text", "tokens", "subset"))
    assert main(["data", "ingest", str(tmp_path / "in"), "-o", text, "--layout", "redpajama"]) == 0
    assert main(["data", "tokenize", text, tokens, "-t", str(folder), "--merge"]) == 0
    draw = ["--tokens", "4k", "--weights", "c4=.75,arxiv=.25", "--valid", "0.1"]
    assert main(["data", "subset", tokens, "-o", subset, *draw]) == 0
    out = capsys.readouterr().out
    assert "200 documents" in out
    assert "4000 tokens" in out
    return tmp_path


def test_commands_lead_from_text_to_samples(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(made / "subset"), "--samples", "1", "--sequence-length", "32"]) == 0
    shown = capsys.readouterr().out
    loader = open_loader(LoaderOptions(str(made / "subset"), 32))
    decoded = open_tokenizer(made / "tokenizer").decode(loader.batch(0, 1).tokens[0])
    assert decoded in shown
    assert "75.00%" in shown
    for path, kind in ((made / "text", "documents"), (made / "tokens", "tokens"), (made / "tokens" / "c4", "prefix")):
        assert main(["data", "inspect", str(path), "--json", "--full"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["kind"] == kind
        assert sum(domain["documents"] for domain in summary["domains"]) == (100 if kind == "prefix" else 200)
        if kind != "documents":
            assert sum(summary["histogram"].values()) == (100 if kind == "prefix" else 200)
            assert summary["duplicates"] == 0


def test_bytes_a_token_are_those_of_the_domains_that_were_drawn(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, subset = str(made / "tokens"), str(made / "one domain")
    draw = ["--tokens", "1k", "--weights", "c4=1,arxiv=0", "--valid", "0", "--test", "0"]
    assert main(["data", "subset", tokens, "-o", subset, *draw, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["bytes_per_token"]
    shards = TokensManifest.load(made / "tokens" / "manifest.json").shards
    of = {name: [shard for shard in shards if shard.domain == name] for name in ("c4", "arxiv")}
    means = {name: sum(one.text_bytes for one in part) / sum(one.tokens for one in part) for name, part in of.items()}
    assert shown == pytest.approx(means["c4"]) != pytest.approx(means["arxiv"])


@pytest.mark.parametrize("boundary", ["reset", "none"])
def test_samples_are_shown_as_the_model_sees_them(
    made: Path, capsys: pytest.CaptureFixture[str], boundary: str
) -> None:
    words = ["--samples", "6", "--sequence-length", "64", "--boundary", boundary]
    assert main(["data", "inspect", str(made / "subset"), *words]) == 0
    shown = capsys.readouterr().out
    decode = open_tokenizer(made / "tokenizer").decode
    batch = open_loader(LoaderOptions(str(made / "subset"), 64, boundary=boundary)).batch(0, 6)
    for row in range(6):
        predicted = int(batch.loss_mask[row].sum())
        if boundary == "none":
            whole = [*batch.tokens[row][:predicted].tolist(), int(batch.labels[row][predicted - 1])]
            texts = [decode(whole[:64])]
        else:
            numbers = batch.segment_ids[row]
            texts = [decode(batch.tokens[row][numbers == number]) for number in range(numbers.max() + 1)]
        joined = "\n----- attention begins anew -----\n".join(texts)
        assert f"sample {row}, 64 tokens, {predicted} predicted:\n{joined}\n" in shown
    assert main(["data", "inspect", str(made / "subset"), "--boundary", "x"]) == 2


def test_order_prints_what_the_loader_reads(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for world in (1, 2, 4):
        words = ["--sequence-length", "32", "--steps", "3:5", "--global-batch", "8", "--world", str(world), "--json"]
        assert main(["data", "order", str(made / "subset"), *words]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == 2 * world
        rows[world] = [window for line in lines for window in line["windows"]]
    loader = open_loader(LoaderOptions(str(made / "subset"), 32, epochs=0))
    assert rows[1] == rows[2] == rows[4] == loader.windows(np.arange(24, 40)).tolist()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["ingest", "{}/none", "-o", "{}/x"], 4, "does not exist"),
        (["tokenize", "{}/in", "{}/x", "-t", "bytes"], 4, "not a finished folder of text"),
        (["tokenize", "{}/text", "{}/x", "-t", "{}/none"], 4, "No tokenizer at"),
        (["tokenize", "{}/text", "{}/x", "-t", "bytes", "--backend", "fast"], 2, "--backend fast"),
        (["subset", "{}/tokens", "-o", "{}/x", "--tokens", "1B"], 4, "too small for the budget"),
        (["subset", "{}/tokens", "-o", "{}/x", "--tokens", "many"], 2, "not a quantity"),
        (["subset", "{}/tokens", "-o", "{}/x", "--tokens", "0"], 2, "at least one token"),
        (["subset", "{}/tokens", "-o", "{}/x", "--valid", ".5", "--test", ".5"], 2, "nothing to train on"),
        (["subset", "{}/tokens", "-o", "{}/subset"], 2, "exists already"),
        (["subset", "{}/tokens", "-o", "{}/tokens", "--overwrite"], 2, "something else than a subset"),
        (["subset", "{}/tokens", "-o", "{}/in/c4_sample.jsonl", "--overwrite"], 2, "something else than a subset"),
        (["subset", "{}/text", "-o", "{}/x"], 4, "`minherit data tokenize` on it first"),
        (["subset", "{}/subset", "-o", "{}/x"], 4, "Name the folders of tokens that it was drawn from"),
        (["subset", "{}/in", "-o", "{}/x"], 4, "a folder without a manifest"),
        (["ingest", "{}/in", "-o", "{}/in/c4_sample.jsonl"], 2, "exists already"),
        (["ingest", "{}/in", "-o", "{}/x", "--text-field", "body"], 4, "with --text-field (now 'body')"),
        (["tokenize", "{}/text", "{}/text", "-t", "bytes"], 4, "begun by a job of another kind"),
        (["inspect", "{}/subset", "--split", "dev"], 4, "no split 'dev'"),
        (["order", "{}/subset", "--steps", "x"], 2, "--steps x"),
        (["order", "{}/subset", "--steps", "5:2"], 2, "holds no step"),
        (["order", "{}/text", "--split", "all"], 4, "describes documents, not tokens"),
    ],
)
def test_mistakes_have_their_exit_code(
    made: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main(["data", *(word.format(made) for word in words)]) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("change", ["truncated bin", "index of the subset", "manifest", "changed bin"])
def test_damage_is_found_with_exit_code_4_and_the_file(
    made: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    token_file = next((made / "tokens" / "c4").glob("*.bin"))
    file = {
        "index of the subset": made / "subset" / "train.ends",
        "manifest": made / "subset" / "manifest.json",
    }.get(change, token_file)
    data = bytearray(file.read_bytes())
    if change == "truncated bin":
        del data[-4:]
    else:
        data[24] ^= 64
    file.write_bytes(data)
    assert main(["data", "order", str(made / "subset"), "--sequence-length", "32"]) == 4
    shown = capsys.readouterr().err
    assert str(file) in shown.replace(f"{made}/subset/../", f"{made}/")
    if change != "manifest":
        assert "offset" in shown


def test_windows_of_other_runs_are_not_written_over(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = made / "kept.safetensors"
    words = ["data", "windows", str(made / "subset"), "--out", str(out), "--count", "4", "--sequence-length", "16"]
    assert main(words) == 0
    before = out.read_bytes()
    assert main(words) == 0, "the same windows again are no other ones"
    assert main([*words, "--seed", "9"]) == 2
    assert "holds other windows" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_windows_are_a_file_with_a_hash_and_the_bytes_of_its_text(made: Path, tmp_path: Path) -> None:
    tokenizer = str(made / "tokenizer")
    path = made / "eval" / "windows.safetensors"
    windows = make_windows(made / "subset", path, tokenizer=tokenizer, sequence_length=16, windows=10)
    again = EvalWindows.load(path)
    assert (again.fingerprint, again.num_bytes, len(again)) == (windows.fingerprint, windows.num_bytes, 10)
    lengths = open_tokenizer(tokenizer).byte_lengths()
    assert again.num_bytes == lengths[again.tokens[:, 1:]].sum()
    assert make_windows(made / "subset", path, tokenizer="none", sequence_length=16, windows=99).tokens.shape == (
        10,
        17,
    )
    batch = again.batch(2, 3)
    assert np.array_equal(batch.labels, again.tokens[2:5, 1:])

    main(
        [
            "data",
            "subset",
            str(made / "tokens"),
            "-o",
            str(made / "other"),
            "--seed",
            "7",
            "--tokens",
            "1k",
            "--valid",
            "0.1",
        ]
    )
    other = open_loader(LoaderOptions(str(made / "other"), 16, split="valid"))
    mine = open_loader(LoaderOptions(str(made / "subset"), 16, split="valid"))
    assert other.stream.spans.num_tokens == mine.stream.spans.num_tokens, "held out alike for every seed and budget"

    from megatron_inherit.base.errors import DataError

    with pytest.raises(DataError, match="another tokenizer"):
        make_windows(made / "subset", made / "x", tokenizer="bytes", sequence_length=16, windows=4)
    with pytest.raises(DataError, match="windows of another length"):
        make_windows(made / "subset", path, tokenizer=tokenizer, sequence_length=17, windows=4)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="was changed"):
        EvalWindows.load(path)
    path.write_bytes(b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00idtR.")
    with pytest.raises(DataError, match="not a file of evaluation windows"):
        EvalWindows.load(path)


def test_one_call_prepares_and_the_second_does_nothing(tmp_path: Path) -> None:
    for number, text in enumerate(make_texts(80)):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.py").write_text(text)
    (tmp_path / "in" / "other.bin").write_bytes(b"\x00")

    def run(**options: object) -> Path:
        return prepare(
            [str(tmp_path / "in")], tmp_path / "out", tokenizer="bytes", pattern="*.py", as_text=True, **options
        )

    subset = run()
    loader = open_loader(LoaderOptions(str(subset), 64, epochs=2))
    assert loader.num_samples > 20
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run() == subset
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    run(tokens=1000)
    assert open_loader(LoaderOptions(str(subset), 64)).stream.spans.num_tokens == 1000


def test_preprocess_data_takes_megatrons_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(50)
    write_jsonl(tmp_path / "in.jsonl", texts, title="a title")
    folder = gpt2_folder(tmp_path / "gpt2")
    own = open_tokenizer(folder)
    tool = runpy.run_path(str(TOOL))["main"]
    flags = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out"), "--append-eod"]
    vocabulary = ["--vocab-file", str(folder / "vocab.json"), "--merge-file", str(folder / "merges.txt")]
    kind = ["--tokenizer-type", "GPT2BPETokenizer", "--json-keys", "text", "title", "--workers", "1"]
    assert tool([*flags, *vocabulary, *kind, "--log-interval", "10", "--partitions", "1"]) == 0
    file = IndexedFile(tmp_path / "out_text_document")
    assert [file[number].tolist() for number in range(50)] == [[*ids, own.eos_id] for ids in own.encode_batch(texts)]
    assert IndexedFile(tmp_path / "out_title_document").num_documents == 50
    assert not (tmp_path / "out.work").exists()
    assert tool([*flags, "--tokenizer-type", "Llama2Tokenizer"]) == 2
    assert "needs --tokenizer-model" in capsys.readouterr().err
    for flag in ("--split-sentences", "--find-optimal-num-workers"):
        assert tool([*flags, "--tokenizer-type", "ByteLevelTokenizer", flag]) == 2
        assert f"{flag} is not supported" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_preprocess_data_writes_what_megatrons_builder_writes(tmp_path: Path, workers: str) -> None:
    """From JSON lines to the same bytes, over several shards and processes."""
    torch = pytest.importorskip("torch")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    texts = make_texts(9000)
    for part in range(3):
        write_jsonl(tmp_path / f"in-{part}.jsonl", texts[part * 3000 : (part + 1) * 3000])
    own = open_tokenizer(gpt2_folder(tmp_path / "gpt2"))
    words = ["--input", str(tmp_path / "in-*.jsonl"), "--output-prefix", str(tmp_path / "out"), "--append-eod"]
    kind = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(tmp_path / "gpt2" / "vocab.json")]
    merges = ["--merge-file", str(tmp_path / "gpt2" / "merges.txt")]
    command = [sys.executable, str(TOOL), *words, *kind, *merges, "--workers", workers, "--keep-work"]
    subprocess.run(command, check=True, timeout=120)
    shards = TokensManifest.load(tmp_path / "out.work" / "text" / "tokens" / "manifest.json").shards
    assert len(shards) >= 3
    dtype = indexed_dataset.DType.optimal_dtype(own.vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for ids in own.encode_batch(texts):
        builder.add_document(torch.tensor([*ids, own.eos_id]), [len(ids) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out_text_document.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
