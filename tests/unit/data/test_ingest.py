from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import tarfile
from pathlib import Path

import pytest

from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.data import ingest as ingest_module
from megatron_inherit.data.ingest import DocumentsManifest, IngestOptions, ingest
from megatron_inherit.data.sources import SourceFile, open_binary
from tests.support.text_data import make_texts, write_jsonl

TEXTS = make_texts(30)


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read_back(out: Path, manifest: DocumentsManifest) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for shard in manifest.shards:
        with open_binary(str(out / shard.name)) as stream:
            texts = [json.loads(line)["text"] for line in stream]
        assert len(texts) == shard.documents
        assert sum(len(text.encode()) for text in texts) == shard.text_bytes
        found.setdefault(shard.domain, []).extend(texts)
    return found


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_source(path: Path) -> None:
    name = path.name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": range(30), "text": TEXTS}), path, row_group_size=7)
        return
    if name.endswith(".tar"):
        path.write_bytes(tar_of({f"{n:03d}.txt": text.encode() for n, text in enumerate(TEXTS)}))
        return
    pack = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
        ".zst": lambda data: pytest.importorskip("zstandard").compress(data),
    }.get(path.suffix, bytes)
    path.write_bytes(pack(lines(TEXTS)))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.json.bz2", "a.parquet", "a.tar"]
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    write_source(tmp_path / name)
    manifest = ingest([str(tmp_path / name)], tmp_path / "out")
    assert read_back(tmp_path / "out", manifest) == {"text": TEXTS}
    assert manifest.rejects == {}


def test_plain_text_is_a_document_a_file_or_a_line(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / "in" / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{number % 3}" / f"{number:02d}.py").write_text(text)
    whole = ingest([str(tmp_path / "in")], tmp_path / "whole", pattern="*.py", as_text=True)
    assert sorted(read_back(tmp_path / "whole", whole)["text"]) == sorted(TEXTS)
    (tmp_path / "b.txt").write_bytes(b"first\r\n\r\n  second\nthird")
    by_line = ingest([f"poems={tmp_path / 'b.txt'}"], tmp_path / "lines", IngestOptions(lines=True))
    assert read_back(tmp_path / "lines", by_line) == {"poems": ["first", "  second", "third"]}


def test_openwebtext_nests_its_archives(tmp_path: Path) -> None:
    inner = [lzma.compress(tar_of({f"{n}-{k}.txt": f"page {n} {k}".encode() for k in range(3)})) for n in range(2)]
    outer = tar_of({f"openwebtext/urlsf_subset{n:02d}-1_data.xz": data for n, data in enumerate(inner)})
    (tmp_path / "openwebtext.tar.xz").write_bytes(lzma.compress(outer))
    (tmp_path / "urlsf_subset01-1_data.xz").write_bytes(inner[1])
    expected = [f"page {n} {k}" for n in range(2) for k in range(3)]
    options = IngestOptions(layout="openwebtext")
    for name, pages in (("openwebtext.tar.xz", expected), ("urlsf_subset01-1_data.xz", expected[3:])):
        manifest = ingest([str(tmp_path / name)], tmp_path / f"out-{name}", options)
        assert read_back(tmp_path / f"out-{name}", manifest) == {"openwebtext": pages}


@pytest.mark.slow
def test_hugging_face_data_sets_saved_and_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    manifest = ingest([str(tmp_path / "saved")], tmp_path / "out")
    assert read_back(tmp_path / "out", manifest) == {"text": TEXTS}
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(b"left by a map")
    splits = datasets.DatasetDict({"train": data, "test": data.select(range(3))})
    splits.save_to_disk(str(tmp_path / "splits"))
    for name in ("saved", "splits"):
        manifest = ingest([f"news={tmp_path / name}"], tmp_path / f"out-{name}")
        assert read_back(tmp_path / f"out-{name}", manifest) == {"news": TEXTS}
    (tmp_path / "folder").mkdir()
    for part in range(3):
        data.shard(3, part, contiguous=True).to_parquet(str(tmp_path / "folder" / f"train-{part}.parquet"))
    options = IngestOptions(layout="fineweb-edu")
    manifest = ingest([f"datasets:{tmp_path / 'folder'}"], tmp_path / "out2", options)
    assert manifest.sources == 3
    assert read_back(tmp_path / "out2", manifest) == {"fineweb-edu": TEXTS}
    with pytest.raises(DataError, match="cannot be streamed"):
        ingest([f"datasets:{tmp_path / 'nothing'}"], tmp_path / "out3")


def test_remote_paths_through_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/c4/part-0.jsonl.gz", gzip.compress(lines(TEXTS[:10])))
    memory.pipe("/bucket/arxiv/part-0.jsonl", lines(TEXTS[10:]))
    manifest = ingest(["memory://bucket"], tmp_path / "out", IngestOptions(layout="redpajama"))
    assert read_back(tmp_path / "out", manifest) == {"c4": TEXTS[:10], "arxiv": TEXTS[10:]}


REDPAJAMA = {
    "arxiv/arxiv_00000.jsonl": "arxiv",
    "book/book.jsonl": "books",
    "c4/c4-train.00000-of-01024.jsonl": "c4",
    "common_crawl/2023-06/en_head_0000.jsonl.zst": "cc",
    "github/filtered_0.jsonl": "github",
    "stackexchange/stackexchange.jsonl": "stackexchange",
    "wikipedia/wiki.jsonl": "wikipedia",
}
SAMPLE = {
    "arxiv_sample.jsonl": "arxiv",
    "book_sample.jsonl": "books",
    "c4_sample.jsonl": "c4",
    "cc_2019-30_sample.jsonl": "cc",
    "cc_2023-06_sample.jsonl": "cc",
    "github_sample.jsonl": "github",
    "stackexchange_sample.jsonl": "stackexchange",
    "wikipedia_sample.jsonl": "wikipedia",
    "c4-rp/part.jsonl": "c4",
}


@pytest.mark.parametrize("names", [REDPAJAMA, SAMPLE], ids=["1T", "sample"])
def test_redpajama_domains_come_from_the_path(tmp_path: Path, names: dict[str, str]) -> None:
    for number, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = lines([TEXTS[number]])
        path.write_bytes(pytest.importorskip("zstandard").compress(data) if name.endswith(".zst") else data)
    manifest = ingest([str(tmp_path / "in")], tmp_path / "out", IngestOptions(layout="redpajama"))
    expected: dict[str, list[str]] = {}
    for number, domain in enumerate(names.values()):
        expected.setdefault(domain, []).append(TEXTS[number])
    assert {k: sorted(v) for k, v in read_back(tmp_path / "out", manifest).items()} == {
        k: sorted(v) for k, v in expected.items()
    }


def test_a_file_of_no_domain_stops_the_job(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "commoncrawl" / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match="belongs to none of RedPajama's domains"):
        ingest([str(tmp_path / "in")], tmp_path / "out", IngestOptions(layout="redpajama"))


def test_slimpajama_names_the_domain_in_the_record(tmp_path: Path) -> None:
    names = {"RedPajamaCommonCrawl": "cc", "RedPajamaC4": "c4", "RedPajamaBook": "books"}
    text = "".join(
        json.dumps({"text": TEXTS[n], "meta": {"redpajama_set_name": list(names)[n % 3]}}) + "\n" for n in range(30)
    )
    path = tmp_path / "train" / "chunk1" / "example_train_0.jsonl.zst"
    path.parent.mkdir(parents=True)
    path.write_bytes(pytest.importorskip("zstandard").compress(text.encode()))
    manifest = ingest([str(tmp_path / "train")], tmp_path / "out", IngestOptions(layout="slimpajama"))
    assert read_back(tmp_path / "out", manifest) == {domain: TEXTS[n::3] for n, domain in enumerate(names.values())}


BAD = {
    "invalid UTF-8": b'{"text": "\xff\xfe"}\n',
    "not JSON": b'{"text": \n',
    "no text field": b'{"content": "x"}\n',
    "empty text": b'{"text": "  "}\n',
    "too long": b'{"text": "' + b"x" * 3000 + b'"}\n',
    "invalid Unicode": b'{"text": "\\ud800"}\n',
}


def test_bad_records_are_counted_sampled_and_reported(tmp_path: Path) -> None:
    good = lines(TEXTS)
    huge = b'{"text": "' + b"y" * 20000 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b"".join(BAD.values()) + huge + b"[1]\n" + good)
    options = IngestOptions(max_bytes=2000, max_reject_share=0.2)
    manifest = ingest([str(tmp_path / "a.jsonl")], tmp_path / "out", options)
    assert manifest.rejects == dict.fromkeys(BAD, 1) | {"too long": 2, "no text field": 2}
    assert read_back(tmp_path / "out", manifest) == {"text": TEXTS + TEXTS}
    samples = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert samples[0]["place"] == f"offset {len(good)}, byte 10"
    assert samples[0]["file"] == str(tmp_path / "a.jsonl")


def test_too_many_bad_records_stop_the_job_and_say_where(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS) + BAD["not JSON"])
    with pytest.raises(DataError, match=r"1 of 31 \(1 not JSON\).*a\.jsonl, offset \d+.*--max-reject-share"):
        ingest([str(tmp_path / "a.jsonl")], tmp_path / "out")
    assert (tmp_path / "out" / "rejects.jsonl").is_file()
    assert not (tmp_path / "out" / "manifest.json").exists()
    (tmp_path / "b.jsonl").write_bytes((lines(TEXTS) + BAD["not JSON"]) * 2000)
    with pytest.raises(DataError, match=r"of 1023 "):
        ingest([str(tmp_path / "b.jsonl")], tmp_path / "out b")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-20], "cannot be read as jsonl"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", "cannot be read as jsonl"),
        ("a.json.zst", b"no frame at all", "cannot be read as jsonl"),
        ("a.jsonl.xz", lzma.compress(lines(TEXTS))[:-20], "cannot be read as jsonl"),
        ("a.parquet", b"PAR1nothing", "cannot be read as parquet"),
        ("a.tar", b"x" * 600, "cannot be read as tar"),
        ("a.jsonl", b"", "hold no text"),
        ("a.exe", b"", "no known suffix"),
    ],
)
def test_a_damaged_or_foreign_source_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        ingest([str(tmp_path / name)], tmp_path / "out")


def test_zstandard_of_several_frames_is_read_whole_and_a_cut_one_refused(tmp_path: Path) -> None:
    compress = pytest.importorskip("zstandard").compress
    data = compress(lines(TEXTS[:10])) + compress(b"") + compress(lines(TEXTS[10:] * 2000))
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    manifest = ingest([str(tmp_path / "a.jsonl.zst")], tmp_path / "out")
    assert read_back(tmp_path / "out", manifest) == {"text": TEXTS[:10] + TEXTS[10:] * 2000}
    (tmp_path / "b.jsonl.zst").write_bytes(data[:-5])
    with pytest.raises(DataError, match="ends inside a Zstandard frame"):
        ingest([str(tmp_path / "b.jsonl.zst")], tmp_path / "out2")


def test_a_missing_column_or_path_is_said(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_source(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column 'body'"):
        ingest([str(tmp_path / "a.parquet")], tmp_path / "out", IngestOptions(text_field="body"))
    with pytest.raises(DataError, match="does not exist"):
        ingest([str(tmp_path / "none.jsonl")], tmp_path / "out2")
    with pytest.raises(DataError, match="is no name for a domain"):
        ingest([f"..={tmp_path / 'a.parquet'}"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file that can be read"):
        ingest([str(tmp_path / "empty")], tmp_path / "out2")


def test_shards_are_cut_and_compressed(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    for number in range(6):
        write_jsonl(tmp_path / "in" / f"c4_{number}.jsonl", make_texts(40, seed=number))
    options = IngestOptions(layout="redpajama", shard_bytes=4000)
    one = ingest([str(tmp_path / "in")], tmp_path / "one", options)
    assert len(one.shards) > 6
    assert all(shard.text_bytes < 4000 + 500 for shard in one.shards)
    packed = ingest([str(tmp_path / "in")], tmp_path / "zst", options.model_copy(update={"compression": "zst"}))
    assert read_back(tmp_path / "zst", packed) == read_back(tmp_path / "one", one)


def test_shards_follow_the_size_of_the_sources_and_not_the_workers(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(12_000, longest=200))
    size = (tmp_path / "a.jsonl").stat().st_size
    manifest = ingest([str(tmp_path / "a.jsonl")], tmp_path / "out")
    assert manifest.options.shard_bytes == 2**20
    assert size // 2**20 - 1 <= len(manifest.shards) <= size // 2**20 + 1 > 2, "a small corpus is shared out too"
    small, large, unknown = (
        SourceFile(path="x", format="jsonl", size=size, mtime_ns=time, domain="text")
        for size, time in ((2**30, 1), (2**50, 1), (0, None))
    )
    assert ingest_module._shard_bytes([small]) == 2**22
    assert ingest_module._shard_bytes([large]) == ingest_module._shard_bytes([unknown]) == 2**26


def test_a_finished_folder_is_left_and_another_plan_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = ingest([str(source)], tmp_path / "out")
    written = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert ingest([str(source)], tmp_path / "out") == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == written
    write_jsonl(source, TEXTS[:-1])
    with pytest.raises(DataError, match=r"other sources or options: .*a\.jsonl.*size was \d+ and is"):
        ingest([str(source)], tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        ingest([str(source)], tmp_path / "other")


def test_the_same_call_makes_a_damaged_shard_again(tmp_path: Path) -> None:
    for number in range(3):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", make_texts(20, seed=number))
    source, out, options = [str(tmp_path / "in")], tmp_path / "out", IngestOptions(shard_bytes=500)
    manifest = ingest(source, out, options)
    before = read_back(out, manifest)
    times = {shard.name: (out / shard.name).stat().st_mtime_ns for shard in manifest.shards}
    (out / manifest.shards[0].name).unlink()
    (out / manifest.shards[-1].name).write_bytes(b"{}")
    again = ingest(source, out, options)
    assert read_back(out, again) == before
    redone = {name for name, time in times.items() if (out / name).stat().st_mtime_ns != time}
    assert {manifest.shards[0].name, manifest.shards[-1].name} <= redone < set(times)


def test_a_source_that_changes_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_inherit.data import ingest as module

    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    read = module.read_documents

    def touching(file, options):
        yield from read(file, options)
        source.write_text("{}")

    monkeypatch.setattr(module, "read_documents", touching)
    with pytest.raises(DataError, match=r"a\.jsonl was changed since the job began"):
        ingest([str(source)], tmp_path / "out")


def test_two_jobs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    import fcntl

    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    ingest([str(source)], tmp_path / "out")
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="Another job is writing"):
            ingest([str(source)], tmp_path / "out")


def test_what_is_left_out_of_a_folder_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_inherit"), "propagate", True)
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)
    for number in range(5):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"x")
    ingest([str(tmp_path / "in")], tmp_path / "out")
    assert "5 files of unknown suffix are left out: 0.png, 1.png, 2.png..." in caplog.text
