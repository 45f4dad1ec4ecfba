"""Subsets of a token budget: whole documents in a seeded random order, as an index; no token is copied.

Each document's place in the order is a keyed hash of its text, so the order depends on the seed alone (not on shards,
files or processes), a smaller subset is a prefix of a larger one in every domain, and equal documents meet. A second
hash, which knows neither seed nor budget, holds documents out for ``valid`` and ``test`` before anything is drawn. The
hashes are sorted in buckets on disk, so memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_inherit.base.atomic import require_space
from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.base.log import get_logger
from megatron_inherit.data.corpus import Corpus, open_corpus
from megatron_inherit.data.job_folder import whole_folder
from megatron_inherit.data.jobs import Progress, Report
from megatron_inherit.data.manifests import (
    MANIFEST,
    DomainRecord,
    FileRecord,
    SplitRecord,
    SubsetManifest,
    SubsetOptions,
)
from megatron_inherit.data.mixture import divide, parse_weights
from megatron_inherit.data.permutation import derive_key, mix64

ROLES = ("train", "valid", "test")
_BUCKET_DOCUMENTS = 1 << 21
_MAX_BUCKETS = 512
_CHUNK = 1 << 20
_RECORD = np.dtype(
    [("key", "<u8"), ("high", "<u8"), ("start", "<i8"), ("tokens", "<i4"), ("domain", "<u2"), ("role", "u1")]
)
_SPAN = np.dtype([("start", "<i8"), ("tokens", "<i8")])
_log = get_logger(__name__)


def make_subset(
    sources: Sequence[str],
    out: str | Path,
    options: SubsetOptions,
    *,
    overwrite: bool = False,
    on_progress: Report | None = None,
) -> SubsetManifest:
    """Draws a subset of folders of tokens and ``.bin/.idx`` prefixes.

    Args:
        sources: Each ``PATH`` or ``DOMAIN=PATH``.
        out: New folder: ``manifest.json`` and, for each split, ``SPLIT.starts`` and ``SPLIT.ends``.
        options: What to draw.
        overwrite: Replaces ``out``.
        on_progress: Gets how many documents were read.

    Raises:
        DataError: Sources are damaged or do not fit each other, or a domain has too few tokens and ``on_short`` is
            ``error``.
        UsageError: ``out`` exists, another job is writing there, or the options leave nothing to train on.
    """
    _refuse_nothing(options)
    out = Path(out)
    corpus = open_corpus(sources)
    available = corpus.tokens_of_domains()
    weights = parse_weights(options.weights, available)
    budgets = None if options.tokens is None else divide(options.tokens, weights)
    unique = _unique_budgets(budgets, weights, options)
    with whole_folder(out, "subset", overwrite=overwrite) as folder:
        drawing = _Drawing(corpus, folder, options, unique, on_progress or (lambda progress: None))
        drawing.run()
        splits = {role: drawing.write_split(role, weights, budgets if role == "train" else None) for role in ROLES}
        manifest = SubsetManifest(
            options=options,
            duplicates=dict(zip(corpus.domains, drawing.duplicates.tolist(), strict=True)),
            tokenizer=corpus.tokenizer,
            shards=corpus.records(out),
            splits={role: split for role, split in splits.items() if split.documents},
        )
        manifest.save(folder / MANIFEST)
    return manifest


def _refuse_nothing(options: SubsetOptions) -> None:
    if options.tokens is not None and options.tokens < 1:
        raise UsageError("A subset has at least one token.", got=f"a budget of {options.tokens}")
    held_out = options.valid_share + options.test_share
    if held_out >= 1:
        raise UsageError(f"The shares held out leave nothing to train on: {held_out:g}.", expected="a sum below 1")


def _unique_budgets(
    budgets: dict[str, int] | None, weights: dict[str, float], options: SubsetOptions
) -> dict[str, int] | None:
    unknown = sorted(set(options.epochs) - set(weights))
    if unknown or any(value < 1 for value in options.epochs.values()):
        raise DataError("Epochs are at least 1, of known domains.", got=dict(options.epochs), expected=sorted(weights))
    if budgets is None:
        if options.epochs or options.weights != "natural":
            raise DataError("Weights and epochs divide a token budget.", fix="Give the budget with --tokens.")
        return None
    return {name: -int(-budget // options.epochs.get(name, 1)) for name, budget in budgets.items()}


class _Drawing:
    """Sorts documents by hash, bucket by bucket, and lays each domain's spans aside until its budget is met."""

    def __init__(
        self, corpus: Corpus, folder: Path, options: SubsetOptions, budgets: dict[str, int] | None, report: Report
    ) -> None:
        self.corpus, self.folder, self.options, self.report = corpus, folder, options, report
        self.budgets = budgets
        self.limit = self._key_limit()
        self.duplicates = np.zeros(len(corpus.domains), np.int64)
        self.tokens = np.zeros((len(ROLES), len(corpus.domains)), np.int64)

    def run(self) -> None:
        """Draws; a second time over all keys if the first estimate of how many are needed was too low."""
        self._draw()
        if self.limit < 2**64 and self._short():
            self.limit = 2**64
            for path in self.folder.glob("spans-*"):
                path.unlink()
            self.duplicates[:], self.tokens[:] = 0, 0
            self._draw()
        self._refuse_short()

    def _key_limit(self) -> int:
        """Keys from here on are surely not needed for the budgets: keys are uniform, so a share of them is enough."""
        if self.budgets is None or self.corpus.documents < _CHUNK:
            return 2**64
        available = self.corpus.tokens_of_domains()
        held_out = self.options.valid_share + self.options.test_share
        share = max(self.budgets[name] / max(1, available[name]) for name in self.budgets)
        return min(2**64, int(1.1 * share / max(1e-9, 1 - held_out) * 2**64))

    def _draw(self) -> None:
        held_out = self.options.valid_share + self.options.test_share
        expected = int(self.corpus.documents * min(1.0, self.limit / 2**64 + held_out)) + 1
        require_space(self.folder, expected * (_RECORD.itemsize + _SPAN.itemsize))
        count = min(_MAX_BUCKETS, -(-expected // _BUCKET_DOCUMENTS))
        if count == 1:
            self._take(np.concatenate([np.empty(0, _RECORD), *self._candidates()]))
            return
        buckets = [self.folder / f"bucket-{number:04d}" for number in range(count)]
        self._partition(buckets)
        for path in buckets:
            if path.is_file():
                self._take(np.fromfile(path, _RECORD))
                path.unlink()

    def _partition(self, buckets: list[Path]) -> None:
        widths = np.array([-(-self.limit // len(buckets)), 2**64 // len(buckets)], np.uint64)
        for records in self._candidates():
            width = widths[(records["role"] > 0).astype(np.int64)]
            number = np.minimum(records["key"] // width, np.uint64(len(buckets) - 1)).astype(np.int64)
            order = np.argsort(number, kind="stable")
            bounds = np.searchsorted(number[order], np.arange(len(buckets) + 1))
            for bucket in np.flatnonzero(np.diff(bounds)).tolist():
                _append_to(buckets[bucket], records[order[bounds[bucket] : bounds[bucket + 1]]])

    def _candidates(self) -> Iterator[np.ndarray]:
        """Yields the documents that may be drawn or are held out, in corpus order."""
        order_key = derive_key(self.options.seed, "documents")
        split_key = derive_key(self.options.split_seed, "held out")
        valid, test = self.options.valid_share, self.options.test_share
        bounds = np.array([int(valid * 2**53), int((valid + test) * 2**53)], np.uint64)
        for domain, shard in self.corpus.shards_in_order():
            for low, high, start, tokens in shard.documents(_CHUNK):
                out = np.empty(len(low), _RECORD)
                out["key"], out["high"], out["start"], out["tokens"] = mix64(low, order_key), high, start, tokens
                place = np.searchsorted(bounds, mix64(high, split_key) >> np.uint64(11), "right")
                out["domain"], out["role"] = domain, np.array([1, 2, 0], np.uint8)[place]
                keep = out["tokens"] > 0
                if self.limit < 2**64:
                    keep &= (out["key"] < np.uint64(self.limit)) | (out["role"] > 0)
                self.report(Progress(documents=len(out)))
                yield out[keep]

    def _take(self, records: np.ndarray) -> None:
        """Appends one bucket's documents, in order and each once, to the files of their role and domain."""
        records = records[np.argsort(records["key"], kind="stable")]
        same = np.zeros(len(records), bool)
        same[1:] = (records["key"][1:] == records["key"][:-1]) & (records["high"][1:] == records["high"][:-1])
        self.duplicates += np.bincount(records["domain"][same], minlength=len(self.duplicates))
        records = records[~same]
        for role in range(len(ROLES)):
            for domain in range(len(self.corpus.domains)):
                chosen = records[(records["role"] == role) & (records["domain"] == domain)]
                self._append(role, domain, chosen)

    def _append(self, role: int, domain: int, records: np.ndarray) -> None:
        ends = np.cumsum(records["tokens"], dtype=np.int64) + self.tokens[role, domain]
        budget = self.budgets[self.corpus.domains[domain]] if self.budgets is not None and role == 0 else None
        if budget is not None:
            count = int(np.searchsorted(ends, budget)) + 1 if self.tokens[role, domain] < budget else 0
            records, ends = records[:count], ends[:count]
        if not len(records):
            return
        spans = np.empty(len(records), _SPAN)
        spans["start"], spans["tokens"] = records["start"], records["tokens"]
        if budget is not None and ends[-1] > budget:
            spans["tokens"][-1] -= ends[-1] - budget
        self.tokens[role, domain] += int(spans["tokens"].sum())
        _append_to(self._spans_path(role, domain), spans)

    def _spans_path(self, role: int, domain: int) -> Path:
        return self.folder / f"spans-{role}-{domain}"

    def _short(self) -> dict[str, tuple[int, int]]:
        """Domains whose training documents do not fill their budget: what there is and what was wanted."""
        if self.budgets is None:
            return {}
        got = dict(zip(self.corpus.domains, self.tokens[0].tolist(), strict=True))
        return {name: (got[name], budget) for name, budget in self.budgets.items() if got[name] < budget}

    def _refuse_short(self) -> None:
        short = self._short()
        if not short:
            return
        empty = [name for name, (got, _) in short.items() if not got]
        lines = "; ".join(f"{name} has {got} of {budget} tokens" for name, (got, budget) in short.items())
        if self.options.on_short == "error" or (empty and self.options.on_short == "repeat"):
            raise DataError(
                f"Some domains are too small for the budget: {lines}.",
                fix="Take fewer tokens, other weights, or choose --on-short repeat or take-all.",
            )
        _log.warning("%s (--on-short %s)", lines, self.options.on_short)

    def write_split(self, role: str, weights: dict[str, float], budgets: dict[str, int] | None) -> SplitRecord:
        """Joins the domains of a role to one stream, going round again where a budget asks for it."""
        number = ROLES.index(role)
        domains, place = [], 0
        paths = {suffix: self.folder / f"{role}.{suffix}" for suffix in ("starts", "ends")}
        with paths["starts"].open("wb") as starts, paths["ends"].open("wb") as ends:
            for domain, name in enumerate(self.corpus.domains):
                source, unique = self._spans_path(number, domain), int(self.tokens[number, domain])
                budget = self._tokens_to_write(name, unique, weights, budgets)
                begin, spans = place, 0
                while place - begin < budget:
                    for whole in _read_spans(source):
                        part = _cut(whole, budget - (place - begin))
                        stops = np.cumsum(part["tokens"]) + place
                        starts.write(part["start"].astype("<i8").tobytes())
                        ends.write(stops.astype("<i8").tobytes())
                        place, spans = int(stops[-1]) if len(stops) else place, spans + len(part)
                source.unlink(missing_ok=True)
                domains.append(
                    DomainRecord(
                        name=name, start=begin, stop=place, weight=weights[name], documents=spans, unique_tokens=unique
                    )
                )
        files = {suffix: FileRecord.of(path) for suffix, path in paths.items()}
        documents = sum(domain.documents for domain in domains)
        if not documents:
            for path in paths.values():
                path.unlink()
        return SplitRecord(tokens=place, documents=documents, domains=tuple(domains), files=files)

    def _tokens_to_write(
        self, name: str, unique: int, weights: dict[str, float], budgets: dict[str, int] | None
    ) -> int:
        if not weights[name]:
            return 0
        if budgets is None:
            return unique
        if self.options.on_short == "take-all":
            return min(budgets[name], int(unique * self.options.epochs.get(name, 1)))
        return budgets[name]


def _append_to(path: Path, records: np.ndarray) -> None:
    with path.open("ab") as file:
        file.write(records.view("u1").data)  # ndarray.tofile does not say why a disk refuses


def _read_spans(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(part := np.fromfile(file, _SPAN, _CHUNK)):
            yield part


def _cut(spans: np.ndarray, budget: int) -> np.ndarray:
    """Gives the first spans up to ``budget`` tokens, the last one cut."""
    ends = np.cumsum(spans["tokens"])
    spans = spans[: int(np.searchsorted(ends, budget)) + 1].copy()
    if len(spans) and budget <= 0:
        return spans[:0]
    over = int(spans["tokens"].sum()) - budget
    if over > 0:
        spans["tokens"][-1] -= over
    return spans
