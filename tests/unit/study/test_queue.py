"""The order in which arms run, and what an arm that diverges takes with it."""

import pytest

from megatron_inherit.base.errors import DivergedError
from megatron_inherit.study import runner
from megatron_inherit.study.schema import load_study
from tests.unit.study.test_schema import study


class Recorder:
    """Stands where runs are started; every run is over at the second look, those named ``bad`` diverge."""

    def __init__(self, bad=()):
        self.begun, self.bad, self.looks = [], bad, {}

    def begin(self, config, *, devices):
        self.begun.append((config.run.name, config.run.seed, devices))

    def is_over(self, config):
        key = config.run.output
        self.looks[key] = self.looks.get(key, 0) + 1
        if self.looks[key] > 1 and config.run.name in self.bad:
            raise DivergedError(f"{config.run.name} diverged")
        return self.looks[key] > 1


@pytest.fixture
def settled(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "start_of", lambda study, job: None)
    monkeypatch.setattr(runner, "_tell", lambda job: None)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)
    arms = [
        {"name": "all", "layers": "first:2"},
        {"name": "random", "layers": "first:2", "init": "random"},
        {"name": "stacked", "layers": "0,1,0,1", "origin": "random"},
        {"name": "twice", "layers": "0,1,2,3", "origin": "stacked"},
    ]
    return load_study(study(tmp_path, arms=arms))


def queue(settled, recorder, groups):
    return runner._Queue(settled, recorder, groups, list(settled.jobs))


def test_an_arm_waits_for_what_it_comes_from_and_every_device_is_used(settled):
    recorder = Recorder()
    queue(settled, recorder, [(0,), (1,)]).work()
    order = [(name, seed) for name, seed, _ in recorder.begun]
    assert sorted(order) == sorted((job.arm.name, job.seed) for job in settled.jobs)
    for seed in (1, 2):
        places = [order.index((name, seed)) for name in ("random", "stacked", "twice")]
        assert places == sorted(places)
    assert {devices for *_, devices in recorder.begun} == {(0,), (1,)}


def test_what_diverges_takes_along_only_what_comes_from_it(settled):
    recorder = Recorder(bad=("random",))
    with pytest.raises(DivergedError, match="random diverged"):
        queue(settled, recorder, [None]).work()
    assert [name for name, *_ in recorder.begun] == ["all", "all", "random", "random"]
