import contextlib
import json
import math
import re
import resource
import sqlite3
import struct
import time

import pytest

from megatron_inherit.arch.counts import flops_per_token
from megatron_inherit.arch.presets import preset
from megatron_inherit.base.errors import MissingExtraError
from megatron_inherit.base.optional import require
from megatron_inherit.train.loggers import open_loggers
from megatron_inherit.train.metrics import MetricsLog, session_row, speedometer, trim
from megatron_inherit.train.progress import Progress


class Failing:
    def log(self, values, step):
        raise OSError("the server is gone")

    def close(self):
        raise AssertionError("left out after its first failure")


class Taking:
    def __init__(self):
        self.taken = []

    def log(self, values, step):
        self.taken.append((step, values))

    def close(self):
        self.taken.append("closed")


def test_rows_are_json_and_a_failing_logger_is_left_out(tmp_path, caplog):
    taking = Taking()
    log = MetricsLog(tmp_path, {"bad": Failing(), "good": taking})
    for step, loss in ((1, 2.5), (2, math.nan)):
        row = {"kind": "train", "step": step, "loss": loss, "mfu": None}
        log.write(row)
        log.send(row)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"kind": "train", "step": 1, "loss": 2.5, "mfu": None},
        {"kind": "train", "step": 2, "loss": None, "mfu": None},
    ]
    assert taking.taken[0] == (1, {"train/loss": 2.5})
    assert taking.taken[-1] == "closed"
    assert caplog.text.count("bad failed and is left out") == 1


def test_a_disk_that_fills_up_within_a_row_damages_none(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"kind": "train", "step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 9, limits[1]))
    try:
        log.write({"kind": "train", "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write({"kind": "train", "step": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_rows_that_could_not_be_written_are_written_later(tmp_path):
    folder = tmp_path / "not-there-yet"
    log = MetricsLog(folder)
    log.write({"kind": "train", "step": 1})
    folder.mkdir()
    log.write({"kind": "train", "step": 2})
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_trimming_keeps_what_came_before(tmp_path):
    lines = [json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')
    assert trim(tmp_path, 2) == 2
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:2]) + "\n"
    assert (tmp_path / "metrics.discarded.jsonl").read_text().splitlines() == [lines[2], '{"kind": "tr']
    assert trim(tmp_path, 2) == 0
    assert trim(tmp_path / "nowhere", 0) == 0


def test_utilisation_follows_its_formula_and_an_unknown_device_has_none():
    model = preset("llama-tiny")
    meter = speedometer(
        model, sequence_length=64, formula="causal", world_size=4, device_name="NVIDIA H200", peak_tflops=None
    )
    assert meter.utilisation(1e6) == pytest.approx(1e6 * flops_per_token(model, 64, "causal") / (4 * 989e12))
    own = speedometer(model, sequence_length=64, formula="palm", world_size=1, device_name="cpu", peak_tflops=0.1)
    assert own.utilisation(1e3) == pytest.approx(1e3 * flops_per_token(model, 64, "palm") / 1e11)
    cpu = speedometer(model, sequence_length=64, formula="palm", world_size=1, device_name="cpu")
    assert cpu.utilisation(1e6) is None
    assert session_row(3, own, {"engine": "megatron"})["flops_formula"] == "palm"


@pytest.mark.slow
def test_tensorboard_writes_an_event_file(tmp_path):
    pytest.importorskip("tensorboard")
    loggers = open_loggers(("tensorboard",), tmp_path, project="p", run="r", config={})
    loggers["tensorboard"].log({"train/loss": 1.0}, 3)
    loggers["tensorboard"].close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.0)]


def wandb_runs(folder):
    """Run id -> losses by step, of wandb's records: a header of seven bytes, and one before each protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, at = path.read_bytes(), 7
        while at + 7 <= len(data):
            _, length, kind = struct.unpack_from("<IHB", data, at)
            assert kind == 1, "a record beyond the first block of 32 KiB"
            row = Record.FromString(data[at + 7 : at + 7 + length])
            values = {item.key or item.nested_key[0]: item.value_json for item in row.history.item}
            if "train/loss" in values:
                steps = found.setdefault(path.stem.removeprefix("run-"), {})
                steps[row.history.step.num] = float(values["train/loss"])
            at += 7 + length
    return found


def trackio_runs(folder):
    from trackio.sqlite_storage import SQLiteStorage

    with contextlib.closing(sqlite3.connect(SQLiteStorage.get_project_db_path(folder.name))) as base:
        rows = base.execute("select run_id, step, metrics from metrics").fetchall()
    found = {}
    for run, step, metrics in rows:
        found.setdefault(run, {})[step] = json.loads(metrics)["train/loss"]
    return found


def mlflow_runs(folder):
    found = {}
    for record in folder.glob("mlruns/*/*/metrics/train/loss"):
        lines = [line.split() for line in record.read_text().splitlines()]
        found[record.parents[2].name] = {int(step): float(value) for _, value, step in lines}
    return found


RUNS = {"wandb": wandb_runs, "trackio": trackio_runs, "mlflow": mlflow_runs}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Gives what opens a logger, logs one loss and closes it again."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read once, when trackio is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)

    def log(name, step, *, resumed=False):
        pytest.importorskip(name)
        about = {"project": tmp_path.name, "run": "r", "config": {"a": {"b": [1]}}}
        loggers = open_loggers((name,), tmp_path, **about, resumed=resumed)
        loggers[name].log({"train/loss": step / 2}, step)
        loggers[name].close()

    return log


def settled(read, folder, losses):
    """Waits for what a logger's own process writes."""
    deadline = time.monotonic() + 60
    while sum(map(len, read(folder).values())) < losses and time.monotonic() < deadline:
        time.sleep(0.1)
    return read(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_that_goes_on_goes_on_in_its_loggers_and_a_new_one_does_not(tmp_path, offline, name):
    offline(name, 3)
    offline(name, 5, resumed=True)
    (run,) = settled(RUNS[name], tmp_path, 2).items()
    assert run[1] == {3: 1.5, 5: 2.5}
    assert json.loads((tmp_path / "loggers.json").read_text()) == {name: run[0]}
    offline(name, 4)
    found = settled(RUNS[name], tmp_path, 3)
    assert len(found) == 2
    assert found[run[0]] == run[1]
    assert json.loads((tmp_path / "loggers.json").read_text())[name] in found.keys() - {run[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "mlflow"])
def test_a_run_that_a_logger_has_lost_is_begun_anew(tmp_path, offline, name, caplog):
    offline(name, 3)
    (tmp_path / "loggers.json").write_text(json.dumps({name: "f" * 32}))
    offline(name, 5, resumed=True)
    assert f"The logger {name} cannot go on with its run ffff" in caplog.text
    assert sorted(settled(RUNS[name], tmp_path, 2).values(), key=str) == [{3: 1.5}, {5: 2.5}]


@pytest.mark.slow
def test_a_server_that_mlflow_cannot_reach_is_told_of_and_left_out(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuch://server")
    assert open_loggers(("mlflow",), tmp_path, project="p", run="r", config={}) == {}
    assert "The logger mlflow cannot be opened and is left out: Unsupported" in caplog.text


def test_a_logger_that_cannot_be_opened_is_left_out_whatever_it_raises(tmp_path, monkeypatch, caplog):
    class Refused(Exception):
        pass

    def refuse(*_, **__):
        raise Refused("no such project")

    def missing(*_, **__):
        require("a_package_that_nobody_has", "logging.loggers=wandb")

    monkeypatch.setattr("megatron_inherit.train.loggers.LOGGERS", {"trackio": refuse, "wandb": missing})
    assert open_loggers(("trackio",), tmp_path, project="p", run="r", config={}) == {}
    assert "trackio cannot be opened and is left out: Refused: no such project" in caplog.text
    with pytest.raises(MissingExtraError, match="pip install"):
        open_loggers(("wandb",), tmp_path, project="p", run="r", config={})


def test_lines_without_a_terminal(caplog):
    caplog.set_level("INFO")
    with Progress(20, 0, every_steps=5, formula="palm") as progress:
        for step in range(1, 12):
            progress.step({"step": step, "loss": 2.0, "tokens_per_s": 1500.0, "mfu": 0.5}, 0.5)
    assert len(caplog.messages) == 2
    assert re.fullmatch(
        r"step 10/20  loss 2\.0000  1\.5k tokens/s  MFU 50\.0% \(palm\)  5\.0s left", caplog.messages[1]
    )


def test_a_bar_on_a_terminal(monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress(20, 5, every_steps=5, formula="palm") as progress:
        progress.step({"step": 10, "loss": 2.0, "tokens_per_s": 1500.0, "mfu": None}, 0.5)
        (task,) = progress._bar.tasks
        assert (task.completed, task.total, task.fields["figures"]) == (10, 20, "loss 2.0000  1.5k tokens/s")
    assert not caplog.messages
