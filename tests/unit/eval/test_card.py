import json

from megatron_inherit.eval.card import UNTRAINED, complete_card, run_of, training_section
from tests.support.run_folders import write_run


def test_a_runs_figures_replace_the_note_of_the_untrained_card(tmp_path):
    path = write_run(tmp_path / "run", final=2.5, mfu=0.41)
    (path / "evaluations").mkdir()
    row = {"task": "piqa", "metric": "acc", "shots": 0, "items": 100, "value": 0.61, "stderr": 0.049}
    (path / "evaluations" / "tasks.json").write_text(json.dumps({"rows": [row]}))
    scores = {"kind": "tasks", "step": 60, "tokens": 30720, "boolq/acc": 0.52, "boolq/acc_stderr": 0.03}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(scores) + "\n")
    step = path / "checkpoints" / "step_00000060"
    step.mkdir(parents=True)
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text(f"# Model\n\n{UNTRAINED}\nUse it.\n")
    complete_card(model, run_of(step))
    card = (model / "README.md").read_text()
    assert UNTRAINED not in card
    assert card.startswith("# Model\n")
    assert card.endswith("Use it.\n")
    assert "| validation loss | 2.500 ± 0.020 nats a token |" in card
    assert "| model FLOPs utilisation (palm) | 41.0% |" in card
    assert "| piqa | acc | 0 | 100 | 0.610 ± 0.049 |" in card
    assert "## Tasks, in training\n\n| task | metric | value |\n|---|---|---|\n| boolq | acc | 0.520 ± 0.030 |" in card
    assert (model / "evaluations" / "tasks.json").is_file()
    assert ("loss_curve.png" in card) == (model / "loss_curve.png").is_file()


def test_what_is_no_run_has_no_section(tmp_path):
    assert run_of(tmp_path) is None
    path = write_run(tmp_path / "run")
    assert "41" not in training_section(run_of(path)).split("utilisation")[0]
