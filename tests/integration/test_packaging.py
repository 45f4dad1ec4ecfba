"""What is shipped: the wheel in an empty environment, the images' install lines, their Dockerfiles."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT_ALL = """
import fnmatch, importlib, pkgutil
import megatron_inherit
names = [m.name for m in pkgutil.walk_packages(megatron_inherit.__path__, "megatron_inherit.")]
free = [n for n in names if not any(fnmatch.fnmatch(n, rule) for rule in NEEDS_EXTRA)]
for name in free:
    importlib.import_module(name)
print(len(free))
"""
NEEDS_EXTRA = (
    "*.kernels.*",
    "*.model.*",
    "*.sharing.*",
    "*.distill.*",
    "*.engines.megatron.*",
    "*.engines.deepspeed.*",
    "*.engines.batches",
    "*.engines.parts",
    "*.eval.harness.lm",
    "*.__main__",
)
"""Modules whose whole purpose is an optional library; everything else imports without one."""


def run(words, **options):
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def tracked_files(*below):
    return run(["git", "ls-files", *below], cwd=ROOT).split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    source = out / "source"
    for name in tracked_files():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    run([sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)])
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_recipes_and_templates(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [name for name in tracked_files("megatron_inherit") if not name.endswith("README.md")]
    assert any(name.endswith(".yaml") for name in shipped)
    assert not [name for name in shipped if name not in names]
    assert any("LICENSE" in name for name in names)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_installs_into_an_empty_environment_and_imports_without_extras(wheel, tmp_path):
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")])
    python = str(tmp_path / "venv" / "bin" / "python")
    index = os.environ.get("MINHERIT_TORCH_INDEX")
    torch = ["torch==2.13.0", *(["--index-url", index] if index else [])]
    run([python, "-m", "pip", "install", "-q", "--constraint", str(ROOT / "constraints.txt"), *torch])
    run([python, "-m", "pip", "install", "-q", "--constraint", str(ROOT / "constraints.txt"), str(wheel)])
    code = f"NEEDS_EXTRA = {NEEDS_EXTRA!r}\n{IMPORT_ALL}"
    assert int(run([python, "-c", code], cwd=tmp_path)) > 30
    listing = run([python, "-m", "megatron_inherit", "--help"], cwd=tmp_path)
    assert "inherit" in listing


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_the_cpu_image_installs_into_an_empty_environment(tmp_path):
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")])
    python = tmp_path / "venv" / "bin" / "python"
    env = os.environ | {"PYTHON": str(python)}
    run(["bash", str(ROOT / "docker/install_cpu.sh"), str(ROOT)], env=env)
    run([str(python.with_name("minherit")), "--version"], cwd=tmp_path)


@pytest.mark.slow
def test_pip_resolves_the_gpu_image(tmp_path):
    env = os.environ | {"PYTHON": sys.executable}
    report = tmp_path / "report.json"
    script = ["bash", str(ROOT / "docker/install_gpu.sh"), str(ROOT)]
    run([*script, "--dry-run", "--quiet", "--report", str(report)], env=env)
    assert '"torch"' not in report.read_text(), "the image's own torch would be replaced"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_dockerfiles_are_clean_under_hadolint(name):
    hadolint = Path(sys.executable).with_name("hadolint")
    assert hadolint.exists(), "hadolint is part of the dev extra"
    run([str(hadolint), str(ROOT / "docker" / name)])


@pytest.mark.parametrize(
    "script",
    sorted(
        p.relative_to(ROOT).as_posix()
        for pattern in ("*.sh", ".ci/run")
        for p in ROOT.rglob(pattern)
        if ".venv" not in p.parts
    ),
)
def test_shell_scripts_are_clean_under_shellcheck(script):
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI"):
            pytest.fail("shellcheck is not installed: apt-get install shellcheck")
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    run(["shellcheck", "-x", script], cwd=ROOT)


def test_an_environment_without_pip_is_made_whole(tmp_path):
    """As on a Debian without python3-venv: the first try leaves a Python that has no pip, the second has to notice."""
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python3"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\n'
        f'echo "$@" >> tries\n{sys.executable} -m venv --without-pip "$3"\nexit 1\n'
    )
    python.chmod(0o755)
    for tries in (1, 2):
        done = subprocess.run(
            ["bash", "tools/setup.sh", "hf"],
            cwd=tmp_path,
            env=os.environ | {"PYTHON": str(python)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "apt-get install python3-venv" in done.stderr
        assert (tmp_path / "tries").read_text() == "-m venv .venv\n" * tries
