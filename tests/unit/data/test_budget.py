from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.data import budget as budget_module
from megatron_inherit.data.budget import make_subset
from megatron_inherit.data.loader import LoaderOptions, open_loader
from megatron_inherit.data.manifests import SubsetManifest, SubsetOptions
from megatron_inherit.data.mixture import check_drawn
from megatron_inherit.data.opening import open_stream
from tests.support.text_data import random_documents, write_tokens

DOMAINS = {"cc": 300, "c4": 200, "books": 100}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three domains; document d of domain k is unique but for 20 that two domains share and 5 doubled inside one."""
    folder = tmp_path_factory.mktemp("corpus")
    common = random_documents(20, seed=99)
    sources = []
    for number, (name, count) in enumerate(DOMAINS.items()):
        documents = random_documents(count, seed=number)
        if name != "books":
            documents[10:30] = common
        if name == "books":
            documents[50:55] = documents[:5]
        sources.append(f"{name}={write_tokens(folder / name, documents)}")
    return sources


def spans_of(folder: Path, split: str) -> dict[str, list[tuple[int, int]]]:
    """Domain to its (source position, tokens) in stream order."""
    stream = open_stream(folder, split)
    lengths = np.diff(stream.spans.ends, prepend=0)
    out = {}
    for domain in stream.domains:
        inside = (stream.spans.ends > domain.start) & (stream.spans.ends <= domain.stop)
        out[domain.name] = list(zip(stream.spans.starts[inside].tolist(), lengths[inside].tolist(), strict=True))
    return out


def texts_of(folder: Path, split: str) -> list[bytes]:
    stream = open_stream(folder, split)
    lengths = np.diff(stream.spans.ends, prepend=0)
    out = []
    for start, length in zip(stream.spans.starts.tolist(), lengths.tolist(), strict=True):
        path, offset = stream.source.locate(start)
        out.append(np.fromfile(path, "<u2", length, offset=offset).tobytes())
    return out


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 5),
    st.integers(100, 3000),
    st.integers(100, 3000),
    st.sampled_from(["natural", "cc=.6,c4=.3,books=.1", "cc=1,c4=2,books=0"]),
)
def test_subsets_are_nested_exact_and_keep_the_shares(
    corpus: list[str], tmp_path_factory: pytest.TempPathFactory, seed: int, one: int, two: int, weights: str
) -> None:
    folder = tmp_path_factory.mktemp("subsets")
    sizes = sorted((one, two))
    made = [
        make_subset(corpus, folder / str(number), SubsetOptions(tokens=size, seed=seed, weights=weights))
        for number, size in enumerate(sizes)
    ]
    for size, manifest in zip(sizes, made, strict=True):
        train = manifest.splits["train"]
        assert train.tokens == size
        for domain in train.domains:
            assert abs((domain.stop - domain.start) - domain.weight * size) <= 1
    small, large = (spans_of(folder / str(number), "train") for number in range(2))
    for name, spans in small.items():
        assert large[name][: max(0, len(spans) - 1)] == spans[:-1]
        if spans:
            start, tokens = large[name][len(spans) - 1]
            assert (start, spans[-1][1] <= tokens) == (spans[-1][0], True), "the last document may be cut"


def test_no_held_out_document_is_in_any_subset_and_none_comes_twice(corpus: list[str], tmp_path: Path) -> None:
    held_out: set[tuple[bytes, ...]] = set()
    for seed in range(3):
        options = SubsetOptions(seed=seed, valid_share=0.1, test_share=0.1)
        manifest = make_subset(corpus, tmp_path / str(seed), options)
        splits = {split: texts_of(tmp_path / str(seed), split) for split in ("train", "valid", "test")}
        everything = [text for texts in splits.values() for text in texts]
        assert len(set(everything)) == len(everything)
        assert sum(manifest.duplicates.values()) == sum(DOMAINS.values()) - len(everything) >= 25
        assert 0.05 < len(splits["valid"]) / len(everything) < 0.15
        held_out.add(tuple(sorted(splits["valid"])))
    assert len(held_out) == 1, "what is held out knows neither seed nor budget"


def test_the_order_depends_on_the_seed_and_not_on_files(corpus: list[str], tmp_path: Path) -> None:
    documents = random_documents(120, seed=4)
    whole = write_tokens(tmp_path / "whole", documents)
    halves = [write_tokens(tmp_path / f"half{n}", part) for n, part in enumerate((documents[60:], documents[:60]))]
    for name, sources in (("a", [f"x={whole}"]), ("b", [f"x={half}" for half in halves])):
        make_subset(sources, tmp_path / name, SubsetOptions(tokens=800))
    assert texts_of(tmp_path / "a", "train") == texts_of(tmp_path / "b", "train")
    make_subset([f"x={whole}"], tmp_path / "c", SubsetOptions(tokens=800, seed=1))
    assert texts_of(tmp_path / "a", "train") != texts_of(tmp_path / "c", "train")


def test_buckets_on_disk_give_the_same_index(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SubsetOptions(tokens=5000, valid_share=0.05)
    make_subset(corpus, tmp_path / "memory", options)
    monkeypatch.setattr(budget_module, "_BUCKET_DOCUMENTS", 17)
    monkeypatch.setattr(budget_module, "_CHUNK", 23)
    make_subset(corpus, tmp_path / "disk", options)
    make_subset(corpus, tmp_path / "all on disk", SubsetOptions())
    monkeypatch.undo()
    make_subset(corpus, tmp_path / "all", SubsetOptions())
    assert _same_index(tmp_path, "all", "all on disk")
    assert _same_index(tmp_path, "memory", "disk")
    assert not list((tmp_path / "disk").glob("bucket*"))


def _same_index(folder: Path, one: str, two: str) -> bool:
    names = sorted(path.name for path in (folder / one).glob("*.*s") if path.suffix in (".starts", ".ends"))
    assert names
    return all((folder / one / name).read_bytes() == (folder / two / name).read_bytes() for name in names)


def test_a_key_limit_that_was_too_low_is_lifted(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SubsetOptions(tokens=6000, weights="cc=.6,c4=.3,books=.1")
    make_subset(corpus, tmp_path / "plain", options)
    for number, share in enumerate((0.02, 0.99)):
        limit = int(share * 2**64)
        monkeypatch.setattr(budget_module._Drawing, "_key_limit", lambda self, limit=limit: limit)
        make_subset(corpus, tmp_path / str(number), options)
        assert _same_index(tmp_path, "plain", str(number))


def test_a_domain_that_runs_out_is_an_error_or_a_policy(corpus: list[str], tmp_path: Path) -> None:
    short = {"tokens": 5000, "weights": "cc=.1,c4=.1,books=.8", "valid_share": 0, "test_share": 0}
    with pytest.raises(DataError, match=r"books has \d+ of 4000 tokens.*--on-short"):
        make_subset(corpus, tmp_path / "error", SubsetOptions(**short))
    assert not (tmp_path / "error").exists()
    assert not list(tmp_path.iterdir())

    repeated = make_subset(corpus, tmp_path / "repeat", SubsetOptions(**short, on_short="repeat"))
    books = {domain.name: domain for domain in repeated.splits["train"].domains}["books"]
    assert books.stop - books.start == 4000 > books.unique_tokens
    spans = spans_of(tmp_path / "repeat", "train")["books"]
    assert spans[: len(spans) // 3] == spans[books.documents - len(spans) :][: len(spans) // 3]
    again = len({start for start, _ in spans})
    assert spans[again : again + 10] == spans[:10], "the second round follows the first"

    taken = make_subset(corpus, tmp_path / "all", SubsetOptions(**short, on_short="take-all"))
    assert taken.splits["train"].tokens == 1000 + books.unique_tokens


def test_epochs_of_a_domain_pass_its_documents_again(corpus: list[str], tmp_path: Path) -> None:
    options = SubsetOptions(tokens=3000, weights="cc=.5,c4=.3,books=.2", epochs={"books": 3})
    books = make_subset(corpus, tmp_path / "s", options).splits["train"].domains[0]
    assert (books.name, books.stop - books.start, books.unique_tokens) == ("books", 600, 200)
    with pytest.raises(DataError, match="Epochs are at least 1, of known domains"):
        make_subset(corpus, tmp_path / "t", SubsetOptions(tokens=3000, epochs={"news": 2}))
    with pytest.raises(DataError, match="divide a token budget"):
        make_subset(corpus, tmp_path / "t", SubsetOptions(epochs={"books": 2}))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("cc=1", "domains without a weight: .*books"),
        ("cc=1,c4=1,books=1,news=1", "weights without a domain: .*news"),
        ("cc=1,c4=x,books=1", "is not a share"),
        ("cc=1,cc=1,c4=1,books=1", "each name once"),
        ("cc=0,c4=0,books=0", "something positive"),
        ("llama", "weights without a domain"),
    ],
)
def test_no_domain_is_left_out_silently(corpus: list[str], tmp_path: Path, weights: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_subset(corpus, tmp_path / "s", SubsetOptions(tokens=500, weights=weights))


def test_what_a_run_draws_is_counted_and_checked(corpus: list[str], tmp_path: Path) -> None:
    manifest = make_subset(corpus, tmp_path / "s", SubsetOptions(tokens=4000, weights="cc=.6,c4=.3,books=.1"))
    loader = open_loader(LoaderOptions(str(tmp_path / "s"), 8, epochs=3))
    weights = {domain.name: domain.weight for domain in manifest.splits["train"].domains}
    domains = manifest.splits["train"].domains
    for start, stop in ((0, 100), (37, 1200), (0, loader.num_samples)):
        windows = loader.windows(np.arange(start, stop)) * 8
        positions = (windows[:, None] + np.arange(8)).ravel()
        counted = {one.name: int(((positions >= one.start) & (positions < one.stop)).sum()) for one in domains}
        assert loader.drawn(start, stop) == counted
        assert check_drawn(counted, weights, sequence_length=8) == []
    wrong = {"cc": 0, "c4": 72000, "books": 8000}
    assert len(check_drawn(wrong, weights, sequence_length=8)) == 2
    assert check_drawn({}, weights, sequence_length=8) == []


def test_an_existing_subset_is_not_replaced_unasked(corpus: list[str], tmp_path: Path) -> None:
    make_subset(corpus, tmp_path / "s", SubsetOptions(tokens=500))
    with pytest.raises(UsageError, match="exists already"):
        make_subset(corpus, tmp_path / "s", SubsetOptions(tokens=600))
    make_subset(corpus, tmp_path / "s", SubsetOptions(tokens=600), overwrite=True)
    assert SubsetManifest.load(tmp_path / "s" / "manifest.json").splits["train"].tokens == 600


def test_data_and_subset_move_together(corpus: list[str], tmp_path: Path) -> None:
    write_tokens(tmp_path / "here" / "tokens" / "x", random_documents(60))
    make_subset([str(tmp_path / "here" / "tokens" / "x")], tmp_path / "here" / "s", SubsetOptions(tokens=500))
    before = open_loader(LoaderOptions(str(tmp_path / "here" / "s"), 8))
    first = before.batch(0, 4).tokens.copy()
    os.rename(tmp_path / "here", tmp_path / "there")
    after = open_loader(LoaderOptions(str(tmp_path / "there" / "s"), 8))
    assert np.array_equal(after.batch(0, 4).tokens, first)
    assert after.fingerprint == before.fingerprint


def test_the_report_of_a_run_warns_of_a_share_that_is_off(
    corpus: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    from megatron_inherit.data.drawn import report_drawn

    monkeypatch.setattr(logging.getLogger("megatron_inherit"), "propagate", True)
    caplog.set_level("INFO")
    short = {"tokens": 5000, "weights": "cc=.1,c4=.1,books=.8", "valid_share": 0, "test_share": 0}
    make_subset(corpus, tmp_path / "s", SubsetOptions(**short, on_short="take-all"))
    loader = open_loader(LoaderOptions(str(tmp_path / "s"), 8, epochs=2))
    n = loader.samples_per_epoch
    assert report_drawn(loader, 2 * n, skipped=[(3, n)]) == {
        name: tokens + loader.drawn(0, 3)[name] for name, tokens in loader.drawn(n, 2 * n).items()
    }
    assert "off its share: books" in caplog.text
    caplog.clear()
    make_subset(corpus, tmp_path / "t", SubsetOptions(tokens=3000, weights="cc=.5,c4=.3,books=.2"))
    report_drawn(open_loader(LoaderOptions(str(tmp_path / "t"), 8)), 300)
    assert "drawn: books" in caplog.text
    assert "(20.00% intended)" in caplog.text
    assert "off its share" not in caplog.text
