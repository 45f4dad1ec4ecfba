"""Our training checkpoint: safetensors and JSON, any layout in, any layout out, every byte under a hash.

::

    step_00000020/
      manifest.json            files with size and xxh3; what was trained, by how many ranks; written last
      state.json               model, step, samples, tokens: what resuming needs beside the tensors
      rank_00000.safetensors   this rank's parts of weights, masters and moments, and its random state
      rank_00000.json          where each part belongs, with its own xxh3
      side/                    tokenizer and licence, so that an export is complete

A part is a box of a canonical tensor, or a range of the row-major elements of a box. A folder without a manifest is no
checkpoint. Nothing here is a pickle.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.atomic import fsync_path, write_json
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.base.faults import fault
from megatron_inherit.checkpoint.checksums import Checksums, Part
from megatron_inherit.checkpoint.extents import Extent, Piece, check_cover, flat_pieces
from megatron_inherit.checkpoint.files import FilePool
from megatron_inherit.checkpoint.formats.safetensors_file import build_header, read_header
from megatron_inherit.checkpoint.stages import KEY, LAYER_PREFIX, PREFIX, UNFOLDED, Ids, fold_own, read_ids, share_names
from megatron_inherit.checkpoint.stream import SideFile, Source, StoredTensor

FORMAT, VERSION = "megatron_inherit", 1
MANIFEST, STATE, SIDE = "manifest.json", "state.json", "side"
LARGEST_JSON = 1 << 30
_CHUNK = 1 << 22


@dataclass(frozen=True)
class StoredPart:
    """A part on its way to a file.

    Attributes:
        name: Canonical tensor name, or a name of the rank's own (``rng``) with the kind ``extra``.
        kind: ``weight``, ``fp32``, ``exp_avg``, ``exp_avg_sq`` or ``extra``.
        global_shape, start, shape: The tensor, and the box of it.
        flat: Range of the box's row-major elements, or None for all of them.
        dtype: Safetensors name.
        data: Gives the bytes as a one-dimensional uint8 array; called once, when they are written.
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    flat: tuple[int, int] | None
    dtype: str
    data: Callable[[], np.ndarray]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of what is written."""
        return self.shape if self.flat is None else (self.flat[1] - self.flat[0],)


def write_rank(folder: Path, rank: int, parts: Sequence[StoredPart], *, step: int) -> None:
    """Writes one rank's two files and makes them durable.

    Args:
        folder: The unfinished checkpoint.
        rank: Number in the files' names.
        parts: In file order.
        step: For the points of ``base.faults``.
    """
    path = folder / f"rank_{rank:05d}.safetensors"
    keys = [f"{number:05d}.{part.kind}.{part.name}" for number, part in enumerate(parts)]
    head, _, size = build_header([(key, p.dtype, p.stored_shape) for key, p in zip(keys, parts, strict=True)])
    whole, records = xxhash.xxh3_64(head), []
    fault("before_shard_write", step)
    with path.open("wb") as file:
        file.write(head)
        for number, (key, part) in enumerate(zip(keys, parts, strict=True)):
            if number == len(parts) // 2:
                fault("mid_shard_write", step)
            data = part.data().data
            for start in range(0, len(data), _CHUNK):
                file.write(data[start : start + _CHUNK])
                whole.update(data[start : start + _CHUNK])
            records.append(_record(key, part, xxhash.xxh3_64_hexdigest(data)))
        file.flush()
        os.fsync(file.fileno())
    write_json(
        folder / f"rank_{rank:05d}.json", {"file": path.name, "size": size, "xxh3": whole.hexdigest(), "parts": records}
    )


def write_manifest(folder: Path, *, world_size: int, facts: Mapping[str, Any]) -> None:
    """Finishes a checkpoint whose ranks have all written: hashes of every file, the ranks' as they told them.

    Args:
        folder: The unfinished checkpoint.
        world_size: Number of ranks.
        facts: JSON-able values a reader may want (step, tokens, config hash).

    Raises:
        CheckpointError: A rank's files are missing.
    """
    files: dict[str, Any] = {}
    for rank in range(world_size):
        name = f"rank_{rank:05d}.json"
        record = read_json(folder / name)
        files[record["file"]] = {"size": record["size"], "xxh3": record["xxh3"]}
        files[name] = _hash_of(folder / name)
    others = [STATE, *sorted(f"{SIDE}/{path.name}" for path in folder.glob(f"{SIDE}/*"))]
    files |= {name: _hash_of(folder / name) for name in others}
    value = {"format": FORMAT, "version": VERSION, "world_size": world_size, **facts, "files": files}
    write_json(folder / MANIFEST, value)
    fsync_path(folder)


def detect(path: str) -> bool:
    """Tells whether a path is a finished training checkpoint, or a run that has one."""
    return _find(Path(path)) is not None


def _find(path: Path) -> Path | None:
    """Resolves a checkpoint, a folder of checkpoints or a run's folder; of several the newest."""
    if _is_checkpoint(path):
        return path
    steps = [*path.glob("step_*"), *path.glob("checkpoints/step_*")]
    finished = [step for step in steps if step.name[5:].isdigit() and _is_checkpoint(step)]
    return max(finished, key=lambda step: int(step.name[5:]), default=None)


def _is_checkpoint(folder: Path) -> bool:
    try:
        return json.loads((folder / MANIFEST).read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest.

    Raises:
        CheckpointError: It is missing, of another format or version, or names files outside the folder.
    """
    value = read_json(folder / MANIFEST)
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise CheckpointError(f"{folder} is no training checkpoint of this version.", got=value.get("version"))
    for name in value["files"]:
        if not re.fullmatch(rf"({SIDE}/)?[\w.+-]+", name) or ".." in name:
            raise CheckpointError(f"{folder / MANIFEST} names a file outside the checkpoint.", got=name)
    return value


def verify(folder: Path, *, share: int = 0, shares: int = 1) -> None:
    """Compares files with their hashes in the manifest.

    Args:
        folder: The checkpoint.
        share: Of the files, sorted, those at ``share, share + shares, ...`` are read.
        shares: Number of ranks that verify together.

    Raises:
        CheckpointError: A file is missing, cut off or changed; names the file and, if it can, the tensor.
    """
    files = read_manifest(folder)["files"]
    for name in sorted(files)[share::shares]:
        _verify_file(folder / name, files[name])


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.", fix="Take an older checkpoint.")
    size = path.stat().st_size
    if size != expected["size"]:
        raise CheckpointError(f"{path} is truncated or was replaced.", got=size, expected=expected["size"])
    got = _hash_of(path)["xxh3"]
    if got != expected["xxh3"]:
        where = _damaged_tensor(path)
        raise CheckpointError(f"{path} was changed{where}: its xxh3 differs.", got=got, expected=expected["xxh3"])


def open_source(path: str | Path) -> Source:
    """Opens a training checkpoint, or the newest one of a run, as a source of weights and optimizer state.

    All but the tensors is compared with its hashes now, each tensor when it is moved.

    Raises:
        CheckpointError: It is unfinished, damaged or incomplete.
    """
    folder = _find(Path(path)) or Path(path)
    manifest = read_manifest(folder)
    files = manifest["files"]
    for name in (name for name in files if name.startswith(f"{SIDE}/")):
        _verify_file(folder / name, files[name])
    state = read_json(folder / STATE, files.get(STATE))
    pool = FilePool()
    stored, identity, parts = _read_ranks(pool, folder, manifest["world_size"], files)
    checksums = Checksums(parts)
    config = ModelConfig.from_json(state["model"])
    details = {key: value for key, value in manifest.items() if key not in ("files", "format")}
    details["optimizer_step"] = state.get("updates", state.get("step", 0))
    own: dict[str, StoredTensor] = {}
    if any(key.startswith(PREFIX) for key in stored):
        ids = read_ids(state.get("hf_config") or {}, config, str(folder / STATE))
        for tensor in (stored[key] for key in stored if key.startswith(LAYER_PREFIX)):
            checksums.check(tensor)
        stored, own = _of_layers(pool, stored, config, ids, str(folder))
        details[KEY] = {name: list(values) for name, values in ids.items()}
    return Source(
        format="native",
        path=str(folder),
        config=config,
        tensors={spec.name: stored[spec.name] for spec in enumerate_tensors(config) if spec.name in stored},
        optimizer={key: value for key, value in stored.items() if ":" in key},
        own=own,
        side_files=tuple(SideFile(file.name, str(file)) for file in sorted(folder.glob(f"{SIDE}/*"))),
        hf_config=state.get("hf_config"),
        details=details,
        identity=identity,
        licence=state.get("licence", ""),
        checksums=checksums,
        pool=pool,
    )


def _read_ranks(
    pool: FilePool, folder: Path, world_size: int, files: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], dict[str, str], list[Part]]:
    """Puts the parts of all ranks together: tensors by ``NAME`` or ``KIND:NAME``, what identifies the files, hashes."""
    pieces: dict[str, list[Piece]] = {}
    parts: list[Part] = []
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    identity = {MANIFEST: _hash_of(folder / MANIFEST)["xxh3"]}
    for rank in range(world_size):
        name = f"rank_{rank:05d}.json"
        record = read_json(folder / name, files.get(name))
        extents, identity[record["file"]] = read_header(pool, str(folder / record["file"]))
        for part in record["parts"]:
            if part["kind"] == "extra":
                continue
            key = part["name"] if part["kind"] == "weight" else f"{part['kind']}:{part['name']}"
            extent = extents[part["key"]]
            pieces.setdefault(key, []).extend(_pieces(part, extent))
            kinds[key] = tuple(part["global_shape"]), extent.dtype
            what = f"tensor {part['name']} ({part['kind']})"
            parts.append(Part(extent.file, extent.offset, extent.nbytes, part["xxh3"], what))
    stored = {key: _stored(key, shape, dtype, pieces[key]) for key, (shape, dtype) in kinds.items()}
    return stored, identity, parts


def _of_layers(
    pool: FilePool, stored: Mapping[str, StoredTensor], config: ModelConfig, ids: Ids, path: str
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Gives each layer the tensors of its stage, and apart from them what layers hold of their own beside these."""
    own = {key: tensor for key, tensor in stored.items() if LAYER_PREFIX in key}
    shared = share_names(stored, config, ids, path)
    if not own:
        return shared, own
    own |= {f"{UNFOLDED}:{name}": tensor for name, tensor in (shared | own).items() if ":" not in name}
    return fold_own(shared, own, pool), own


def read_extras(folder: Path, rank: int) -> dict[str, np.ndarray]:
    """Reads what a rank kept for itself (its random state), as bytes by name; nothing if it wrote none."""
    record = read_json(folder / f"rank_{rank:05d}.json")
    names = {part["key"]: part["name"] for part in record["parts"] if part["kind"] == "extra"}
    pool = FilePool()
    try:
        extents, _ = read_header(pool, str(folder / record["file"]))
        return {
            name: np.frombuffer(pool.read(extents[key].file, extents[key].offset, extents[key].nbytes), np.uint8)
            for key, name in names.items()
        }
    finally:
        pool.close()


def read_json(path: Path, expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads a JSON object of a checkpoint.

    Args:
        path: The file.
        expected: Its entry in the manifest, to be compared with.

    Raises:
        CheckpointError: The file is missing, too large, changed or not a JSON object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} is too large.", got=f"{path.stat().st_size} bytes")
        data = path.read_bytes()
        if expected is not None and xxhash.xxh3_64_hexdigest(data) != expected["xxh3"]:
            _verify_file(path, expected)
        value = json.loads(data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", fix="Take an older checkpoint.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON.", fix="Take an older checkpoint.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object.", fix="Take an older checkpoint.")
    return value


def _record(key: str, part: StoredPart, digest: str) -> dict[str, Any]:
    return {
        "key": key,
        "name": part.name,
        "kind": part.kind,
        "global_shape": part.global_shape,
        "start": part.start,
        "shape": part.shape,
        "flat": part.flat,
        "xxh3": digest,
    }


def _pieces(part: Mapping[str, Any], extent: Extent) -> Iterable[Piece]:
    start, shape = tuple(part["start"]), tuple(part["shape"])
    if part["flat"] is None:
        return [Piece(start, extent)]
    inside = flat_pieces(shape, part["flat"][0], extent)
    return [replace(p, start=tuple(a + b for a, b in zip(start, p.start, strict=True))) for p in inside]


def _stored(key: str, shape: tuple[int, ...], dtype: str, pieces: Sequence[Piece]) -> StoredTensor:
    check_cover(key, shape, pieces)
    return StoredTensor(shape, dtype, tuple(pieces))


def _hash_of(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
        return {"size": file.tell(), "xxh3": digest.hexdigest()}


def _damaged_tensor(path: Path) -> str:
    """Names the tensor of a rank's file whose own hash is wrong, as far as header and record can still be read."""
    if path.suffix != ".safetensors":
        return ""
    pool = FilePool()
    try:
        extents, _ = read_header(pool, str(path))
        for part in read_json(path.with_suffix(".json"))["parts"]:
            extent = extents[part["key"]]
            if xxhash.xxh3_64_hexdigest(pool.read(extent.file, extent.offset, extent.nbytes)) != part["xxh3"]:
                return f" in tensor {part['name']} ({part['kind']})"
        return " in its header"
    except (CheckpointError, KeyError):
        return " in its header"
    finally:
        pool.close()
