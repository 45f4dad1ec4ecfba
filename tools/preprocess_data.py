#!/usr/bin/env python3
"""Megatron-LM's ``tools/preprocess_data.py`` on this package: its flags, its output files.

Writes ``PREFIX_KEY_document.bin`` and ``.idx`` for each key. A killed job goes on where it was when it is run again.
Differences: BOS is added only with ``--prepend-bos`` (Megatron's Llama2Tokenizer always adds it); documents keep the
order of the input; a text that is empty, or a list of sentences, is a bad record.
"""

from __future__ import annotations

import argparse
import glob
import shutil
import sys
from pathlib import Path

from megatron_inherit.base import log
from megatron_inherit.base.errors import MinheritError, UsageError

_GPT2_NAMES = {"vocab": ("vocab.json", "encoder.json"), "merges": ("merges.txt", "vocab.bpe")}
_FILE_TYPES = {
    "HuggingFaceTokenizer": "tokenizer_model",
    "SentencePieceTokenizer": "tokenizer_model",
    "GPTSentencePieceTokenizer": "tokenizer_model",
    "Llama2Tokenizer": "tokenizer_model",
    "GPT2BPETokenizer": "vocab_file",
    "ByteLevelTokenizer": None,
}

_REFUSED = {
    "--split-sentences": "sentences are for BERT and T5; decoders are trained on documents.",
    "--find-optimal-num-workers": "speed is even in the workers up to the number of cores; give --workers.",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="JSON lines (also .gz, .zst) or parquet; may be a glob")
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--json-keys", nargs="+", default=["text"])
    parser.add_argument("--tokenizer-type", required=True, choices=sorted(_FILE_TYPES))
    parser.add_argument("--tokenizer-model", help="folder, tokenizer.json or SentencePiece model")
    parser.add_argument("--vocab-file", help="GPT-2's vocab.json")
    parser.add_argument("--merge-file", help="GPT-2's merges.txt")
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--prepend-bos", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--partitions", type=int, default=1, help="accepted; the work is always cut into shards")
    parser.add_argument("--log-interval", type=int, default=1000, help="accepted; progress shows every ten seconds")
    parser.add_argument("--keep-sequential-samples", action="store_true", help="accepted; the order is always kept")
    parser.add_argument("--dataset-impl", choices=["mmap"], default="mmap", help="accepted: there is one")
    parser.add_argument("--keep-newlines", action="store_true", help="accepted; nothing removes them")
    parser.add_argument("--lang", default="english", help="accepted; only sentences depend on it")
    for flag, reason in _REFUSED.items():
        parser.add_argument(flag, action="store_true", help=f"refused: {reason}")
    parser.add_argument("--max-reject-share", type=float, default=0.01, help="more bad records stop the job")
    parser.add_argument("--keep-work", action="store_true", help="keep PREFIX.work, the shards of text and tokens")
    return parser.parse_args(argv)


def tokenizer_of(args: argparse.Namespace) -> str:
    wanted = _FILE_TYPES[args.tokenizer_type]
    if wanted is None:
        return "bytes"
    path = getattr(args, wanted)
    if not path:
        raise UsageError(f"--tokenizer-type {args.tokenizer_type} needs --{wanted.replace('_', '-')}.")
    if wanted == "vocab_file":
        expected = dict(zip(*_GPT2_NAMES.values(), strict=True)).get(Path(path).name)
        if expected is None or (args.merge_file and Path(args.merge_file) != Path(path).with_name(expected)):
            raise UsageError(
                "The two files of GPT-2's vocabulary stand in one folder as vocab.json and merges.txt, "
                "or as encoder.json and vocab.bpe.",
                got=f"{path}, {args.merge_file}",
            )
    return str(path)


def preprocess(args: argparse.Namespace) -> None:
    from megatron_inherit.cli.data_progress import ProgressMeter
    from megatron_inherit.data.ingest import IngestOptions, ingest
    from megatron_inherit.data.jobs import start_server
    from megatron_inherit.data.merge import merge_domains
    from megatron_inherit.data.tokenize import TokenizeOptions, tokenize

    for flag, reason in _REFUSED.items():
        if getattr(args, flag.lstrip("-").replace("-", "_")):
            raise UsageError(f"{flag} is not supported: {reason}")
    inputs = sorted(glob.glob(args.input)) or [args.input]
    tokenizer = tokenizer_of(args)
    if args.workers > 1:
        start_server("megatron_inherit.data.tokenize")
    work = Path(f"{args.output_prefix}.work")
    for key in args.json_keys:
        reading = IngestOptions(text_field=key, max_reject_share=args.max_reject_share)
        with ProgressMeter(f"{key}: read") as meter:
            texts = work / key / "text"
            ingest([f"document={path}" for path in inputs], texts, reading, workers=args.workers, on_progress=meter.add)
        how = TokenizeOptions(tokenizer=tokenizer, append_eos=args.append_eod, prepend_bos=args.prepend_bos)
        with ProgressMeter(f"{key}: tokenize") as meter:
            tokenize(texts, work / key / "tokens", how, workers=args.workers, on_progress=meter.add)
        merge_domains(work / key / "tokens", {"document": Path(f"{args.output_prefix}_{key}_document")})
    if not args.keep_work:
        shutil.rmtree(work)


def main(argv: list[str] | None = None) -> int:
    log.set_up()
    try:
        preprocess(parse(argv))
    except KeyboardInterrupt:
        return 130
    except MinheritError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
