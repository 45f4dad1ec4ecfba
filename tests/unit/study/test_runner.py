"""What happens around a study's runs: missing inputs, devices of a scheduler, arrays, signals and failures before."""

import shutil

import pytest

from megatron_inherit.base.errors import DataError, DivergedError, PreemptedError, UsageError
from megatron_inherit.cli.main import main
from megatron_inherit.study import runner
from megatron_inherit.study.arms import Trainer, visible_devices
from megatron_inherit.study.runner import _teacher, array_share, require_inputs
from megatron_inherit.study.schema import load_study
from tests.unit.study.test_schema import study


@pytest.fixture
def settled(tmp_path):
    return load_study(study(tmp_path))


def status(job, text):
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "exit_status.json").write_text(text)


def test_a_study_without_its_data_names_the_script_that_makes_it(tmp_path, capsys):
    words = ["study", "run", "repair-cpu", "--out", str(tmp_path / "out"), f"data.path={tmp_path / 'subset'}"]
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 4
        said = capsys.readouterr().err
        assert "teacher reads what is not there: data.path" in said
        assert "eval.windows runs/studies/data/valid.safetensors" in said
        assert "bash examples/study_cpu.sh repair-cpu" in said
        assert not (tmp_path / "out").exists()


def test_inputs_are_looked_for_where_a_run_reads_them(tmp_path):
    corpus, windows = tmp_path / "corpus", tmp_path / "windows.safetensors"
    places = [f"data.path={corpus}", f"eval.windows={windows}"]
    arms = [{"name": "random", "layers": "all", "repair": {"methods": "affine", "text": str(tmp_path / "text")}}]
    settled = load_study(study(tmp_path, arms=arms), places)
    with pytest.raises(DataError, match="minherit data windows"):
        require_inputs(settled, settled.jobs)
    (tmp_path / "corpus.bin").touch()  # the prefix of a .bin and an .idx
    windows.touch()
    with pytest.raises(DataError, match=r"random, seed 1 reads what is not there: repair.text [^,]*text\."):
        require_inputs(settled, settled.jobs)
    (tmp_path / "text").touch()
    require_inputs(settled, settled.jobs)


@pytest.mark.parametrize(
    ("own", "places", "named"),
    [(None, (0, 1), "0,1"), ("", (2,), "2"), ("4,6,7", (0, 2), "4,7"), ("GPU-a,GPU-b", (1,), "GPU-b")],
)
def test_a_run_sees_a_part_of_what_the_scheduler_gave(own, places, named):
    assert visible_devices(places, {} if own is None else {"CUDA_VISIBLE_DEVICES": own}) == named


@pytest.mark.parametrize(
    ("tasks", "last", "step", "refused"), [(3, 6, 1, False), (3, 8, 2, False), (3, 9, 1, True), (1, 4, 1, False)]
)
def test_an_array_with_gaps_is_refused(settled, tasks, last, step, refused):
    place = {"ID": "4", "MIN": "4", "MAX": str(last), "STEP": str(step), "COUNT": str(tasks)}
    environment = {f"SLURM_ARRAY_TASK_{name}": value for name, value in place.items()}
    if not refused:
        assert array_share(settled.jobs, environment)[1]
        return
    with pytest.raises(UsageError, match="indices of this SLURM array have gaps"):
        array_share(settled.jobs, environment)


def test_a_task_that_waits_hears_that_the_teacher_failed(settled, monkeypatch):
    monkeypatch.setattr(runner, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(runner, "FAILED_SECONDS", 0.05)
    status(settled.teacher, '{"exit_code": 6, "reason": "the loss did not recover"}')
    with Trainer() as trainer, pytest.raises(DivergedError, match="the loss did not recover"):
        _teacher(settled.teacher, trainer, train=False)


def test_a_failure_from_before_is_not_that_of_a_teacher_that_is_tried_again(settled, monkeypatch):
    job = settled.teacher
    status(job, '{"exit_code": 4, "reason": "no data"}')
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:  # the first task begins the teacher anew, and trains for longer than a failure may stand
            (job.folder / "exit_status.json").unlink()
            clock[0] += 1000
        if len(waits) == 5:
            finished.append(True)

    clock, finished = [0.0], []
    monkeypatch.setattr(runner.time, "sleep", wait)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runner, "is_finished", lambda config: bool(finished))
    _teacher(job, Trainer(), train=False)
    assert len(waits) == 5


def test_a_signal_ends_the_wait_for_a_teacher(settled, monkeypatch):
    monkeypatch.setattr(runner, "WAIT_SECONDS", 0.01)
    trainer = Trainer()
    trainer.stop()
    with pytest.raises(PreemptedError, match="a signal came"):
        _teacher(settled.teacher, trainer, train=False)


def test_how_a_session_before_ended_is_forgotten_when_a_run_begins(settled, monkeypatch):
    job = settled.jobs[0]
    status(job, '{"exit_code": 75, "reason": "Stopped after step 3"}')
    seen = []
    trainer = Trainer()
    monkeypatch.setattr(trainer, "_launch", lambda folder, environment: seen.append(list(folder.iterdir())))
    trainer.begin(job.config)
    assert "exit_status.json" not in {path.name for path in seen[0]}
    shutil.rmtree(job.folder)
