"""Checks B1 to B9, B11 and B12: the shipped studies, run whole, each arm once; over an hour of one core."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_inherit.cli.main import main
from megatron_inherit.study.compare import read_findings

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(4 * 3600)]
ROOT = Path(__file__).resolve().parents[2]
STUDIES = {
    "initialisation-cpu": ["B1", "B2", "B3", "B4", "B5a", "B5b", "B5c", "B5d", "B6", "B8a", "B8b", "R1"],
    "layers-cpu": ["B7a", "B7b", "B9", "B11"],
    "rewarming-cpu": ["B12"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = str(folder / "library.jsonl")
    subprocess.run([sys.executable, str(ROOT / "examples/standard_library.py"), text], check=True)
    words = [
        ["ingest", text, "--out", str(folder / "text")],
        ["tokenize", str(folder / "text"), str(folder / "tokens"), "--tokenizer", "bytes"],
        ["subset", str(folder / "tokens"), "--out", str(folder / "subset"), "--valid", "0.05", "--test", "0"],
        f"windows {folder}/subset --out {folder}/valid.safetensors --count 256 --sequence-length 64".split(),
    ]
    for each in words:
        assert main(["data", *each]) == 0
    return folder


@pytest.mark.parametrize("study", STUDIES)
def test_the_claims_hold(study, data):
    out = data / "studies"
    words = [f"data.path={data / 'subset'}", f"eval.windows={data / 'valid.safetensors'}"]
    assert main(["study", "run", study, *words, "--out", str(out)]) == 0
    found = read_findings(out / f"{study}.yaml")
    assert not found.missing
    assert [verdict.claim.id for verdict in found.verdicts] == STUDIES[study]
    broken = [(v.claim.id, v.claim.says, v.gains, v.bound) for v in found.verdicts if not v.holds]
    assert not broken
