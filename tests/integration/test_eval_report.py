import json
import os
import re
import shutil
import subprocess

import pytest
import yaml

pytest.importorskip("matplotlib", reason="needs matplotlib")

from megatron_inherit.cli.main import main
from tests.support.growth_record import write_growth
from tests.support.run_folders import write_run


@pytest.fixture
def study(tmp_path):
    write_run(tmp_path / "study" / "inherit", final=2.5, start=3.4)
    write_run(tmp_path / "study" / "random <script>alert(1)</script>", final=3.0, init="random")
    return tmp_path / "study"


def test_the_page_is_whole_escaped_and_needs_nothing_else(study, tmp_path, capsys):
    out = tmp_path / "page" / "report.html"
    assert main(["report", str(study), "--out", str(out), "--price", "2.5"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(out), str(out.with_suffix(".png"))]
    page = out.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"|url\((?!#)([^)]*)\)|@import', page)
    assert links == []
    assert "2.500" in page
    assert "0.500" in page  # the gap to the random arm
    assert "minherit train " in page
    assert "minherit launch slurm " in page
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_arms_on_different_windows_are_not_compared(study, tmp_path):
    write_run(study / "foreign", final=1.0, fingerprint="others")
    out = tmp_path / "report.html"
    assert main(["report", str(study), "--out", str(out)]) == 0
    page = out.read_text()
    assert "cannot be compared" in page
    assert "not the same for every arm" in page
    assert "Best final loss" not in page


def test_a_run_is_made_again_beside_the_old_one_and_machines_are_told_once(study, tmp_path):
    out = tmp_path / "report.html"
    assert main(["report", str(study), "--out", str(out)]) == 0
    page = out.read_text()
    assert f"run.output={study / 'inherit'}-again" in page
    assert "2026-01-01T00:00:00Z  minherit train inherit" in page
    assert "/opt/venv" not in page
    assert page.count("versions: torch") == 1


def test_what_no_run_has_is_no_column(study, tmp_path):
    out = tmp_path / "report.html"
    assert main(["report", str(study), "--out", str(out)]) == 0
    assert "MFU" not in out.read_text()
    write_run(study / "fast", mfu=0.5)
    assert main(["report", str(study), "--out", str(out)]) == 0
    assert "<th>MFU</th>" in out.read_text()


@pytest.mark.parametrize("option", ["--analysis", "--evaluation"])
def test_a_named_file_is_never_left_out(study, tmp_path, capsys, option):
    other = tmp_path / "other.json"
    other.write_text('{"kind": "manifest"}')
    for name, said in (("nope.json", "does not exist"), ("other.json", "is no JSON file of 'minherit")):
        assert main(["report", str(study), option, str(tmp_path / name)]) == 4
        assert said in capsys.readouterr().err
    assert not list(study.glob("*.html"))


def test_the_page_goes_into_a_folder_and_never_over_its_picture(study, tmp_path, capsys):
    assert main(["report", str(study), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert main(["report", str(study), "--out", str(tmp_path / "page.png")]) == 2
    assert "page.html" in capsys.readouterr().err


def test_a_sweep_of_depths_is_drawn(tmp_path):
    for layers, loss in ((2, 3.0), (4, 2.7), (6, 2.6)):
        write_run(tmp_path / "study" / f"n-{layers}", layers=layers, final=loss)
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "study"), "--out", str(out)]) == 0
    assert "<h2>Depth</h2>" in out.read_text()


def test_seeds_of_an_arm_are_one_line_and_one_curve(tmp_path):
    for arm, finals in (("inherit", (2.4, 2.6)), ("random", (3.0, 3.2))):
        for seed, final in enumerate(finals, start=1):
            init = "random" if arm == "random" else "weights"
            folder = write_run(tmp_path / "study" / "arms" / arm / f"seed{seed}", final=final, init=init)
            recipe = yaml.safe_load((folder / "run.yaml").read_text())
            recipe["run"] |= {"name": arm, "seed": seed}
            (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "study"), "--out", str(out)]) == 0
    page = out.read_text()
    assert len(re.findall(r'<th scope="row"><span class="dot"', page)) == 2
    assert re.search(r'class="loss">2\.500.*?<td>2</td><td>0\.1000</td>', page, re.DOTALL)
    assert "\N{MINUS SIGN}0.600" in page  # between the means
    assert "one standard error over the seeds" in page


def score(folder, **tasks):
    """Adds scores on the way to a run, and a suite's results with published ones beside them."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step, share in ((30, 0.5), (60, 1.0)):
            scores = {f"{name}/acc": share * value for name, value in tasks.items()}
            errors = {f"{name}/acc_stderr": 0.01 for name in tasks}
            file.write(json.dumps({"kind": "tasks", "step": step, "tokens": 512 * step, **scores, **errors}) + "\n")
    rows = [
        {"task": name, "metric": "acc", "shots": 0, "items": 100, "value": value, "stderr": 0.05}
        | {"published": {"OpenLLaMA <3B>": [0.75, 0.011]}}
        for name, value in tasks.items()
    ]
    (folder / "evaluations").mkdir()
    suite = {"checkpoint": str(folder), "suite": "inheritune", "published_names": ["OpenLLaMA <3B>"], "rows": rows}
    (folder / "evaluations" / "inheritune.json").write_text(json.dumps(suite))


def test_tasks_are_shown_with_their_errors_beside_published_ones(study, tmp_path):
    score(study / "inherit", piqa=0.625, boolq=0.5)
    out = tmp_path / "report.html"
    assert main(["report", str(study), "--out", str(out)]) == 0
    page = out.read_text()
    assert "Tasks: suite inheritune" in page
    assert "<td>0.625 <small>± 0.050</small></td><td>0.750 <small>± 0.011</small></td>" in page
    assert "OpenLLaMA &lt;3B&gt;" in page
    training = page[page.index("Tasks in training") :]
    assert "<td>0.625 <small>± 0.010</small></td>" in training
    assert training.index("piqa/acc") < training.index("boolq/acc"), "a figure a task"


def test_a_growth_shows_each_decision(tmp_path):
    write_growth(tmp_path / "growth")
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "growth"), "--out", str(out)]) == 0
    page = out.read_text()
    assert "<b>6 of 8 blocks match the teacher.</b>" in page
    row = re.search(r'<th scope="row">round 1</th>.*?</tr>', page, re.DOTALL)[0]
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", row)]
    assert cells[:6] == [
        "4 0-3",
        "1.280 ± 0.020",
        "1.200 ± 0.020",
        "+0.0800 ± 0.0040",
        "does not match: grow to 6",
        "60",
    ]
    assert "matches: stop <small>(close)</small>" in page
    assert "tolerance 0.02" in page, "the bar in the figure"
    assert "grow.json" in page
    assert f"minherit grow {tmp_path}/growth/grow.yaml run.output={tmp_path}/growth-again" in page


def test_a_study_is_run_again_as_a_whole(study, tmp_path, capsys):
    (study / "notes.yaml").write_text("a: [1, 2]\n")
    (study / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "question": "Why?", "recipe": {}, "arms": []}))
    out = tmp_path / "report.html"
    assert main(["report", str(study), "--out", str(out)]) == 0
    page = out.read_text()
    assert f"minherit study run {study}/mine.yaml --out {study}-again" in page
    assert "<h1>Study mine</h1>" in page
    assert "notes.yaml" not in page
    assert "mine.yaml are left out" in capsys.readouterr().err


def test_what_a_study_found_stands_on_its_page(study, tmp_path):
    from megatron_inherit.eval.page_table import PageTable
    from megatron_inherit.eval.report import write_report

    table = PageTable(
        "Study <one>", "Which?", ("arm", "gap", ""), [("all", "-0.394", "why"), ("random", "", "")], "Paired."
    )
    page, _ = write_report([study], out=tmp_path / "report.html", tables=[table])
    text = page.read_text()
    assert "<h2>Study &lt;one&gt;</h2>" in text
    assert '<tr><th scope="row">all</th><td>-0.394</td><td class="words">why</td></tr>' in text
    assert "Paired." in text


def test_no_run_is_a_usage_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "neither a run nor a study" in capsys.readouterr().err


def browser():
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None and os.environ.get("CI"):
        pytest.fail("The Debian package chromium is not installed; CI needs it for the screenshot.")
    return found or pytest.skip("needs a browser: install the Debian package chromium")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_real_browser_shows_the_page_without_sideways_scrolling(study, tmp_path, width):
    score(study / "inherit", **{f"task_number_{number}": 0.1 * number for number in range(1, 6)})
    write_growth(study / "growth")
    import numpy as np
    from matplotlib.image import imread

    out, shot = tmp_path / "report.html", tmp_path / "shot.png"
    assert main(["report", str(study), "--out", str(out)]) == 0
    probe = "<script>document.title = 'scroll ' + document.documentElement.scrollWidth</script></body>"
    measured = tmp_path / "measured.html"
    measured.write_text(out.read_text().replace("</body>", probe))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [browser(), *flags.split(), "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400"]
    subprocess.run([*command, f"--screenshot={shot}", f"file://{out}"], check=True, timeout=120, capture_output=True)
    dom = subprocess.run([*command, "--dump-dom", f"file://{measured}"], check=True, timeout=120, capture_output=True)
    found = re.search(r"<title>scroll (\d+)</title>", dom.stdout.decode())
    assert found is not None
    assert int(found[1]) <= max(width, 500)  # headless Chromium lays no window out narrower than 500 points
    pixels = imread(shot)[..., :3]
    assert pixels.shape[1] == width
    assert 0.02 < np.mean(pixels.min(axis=-1) < 0.9) < 0.6  # drawn on, and mostly paper
    colourful = np.ptp(pixels, axis=-1) > 0.3
    assert colourful.sum() > 500  # the curves


def test_a_teacher_among_the_runs_is_a_line_and_its_students_keep_their_colours(tmp_path):
    root = tmp_path / "runs" / "study"
    write_run(root / "a-teacher", final=2.0, layers=8)
    config = {"num_layers": 8}
    for name, kind in (("inherit", "copy"), ("random", "init")):
        write_run(root / name, final=2.5 if kind == "copy" else 3.0, model_path=f"runs/study/start/{name}")
        start = root / "start" / name
        start.mkdir(parents=True)
        op = {"op": kind, "target": "embed.weight", "source": "embed.weight"}
        origin = {"path": "runs/study/a-teacher", "config": config}
        (start / "inherit.json").write_text(json.dumps({"plan": {"ops": [op], "origin": origin}}))
    out = tmp_path / "report.html"
    assert main(["report", str(root), "--out", str(out)]) == 0
    page = out.read_text()
    assert "Best final loss</dt><dd>2.500" in page
    rows = re.findall(r'background: var\((--[\w-]+)\)"></span>([\w-]+)', page)
    assert rows == [("--muted", "a-teacher"), ("--series-1", "inherit"), ("--series-2", "random")]
    assert "0.500" in page
