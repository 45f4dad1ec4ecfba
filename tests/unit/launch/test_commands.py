import subprocess
import sys

import pytest

from megatron_inherit.base.errors import UsageError
from megatron_inherit.launch.commands import deepspeed_words, torchrun_words


def test_torchrun_on_one_node_is_standalone():
    words = torchrun_words("tiny", ["train.steps=2"], gpus_per_node=4)
    assert words == [
        "torchrun",
        "--nproc-per-node=4",
        "--standalone",
        "-m",
        "megatron_inherit",
        "train",
        "tiny",
        "train.steps=2",
    ]


def test_several_nodes_need_a_meeting_point():
    with pytest.raises(UsageError, match="rendezvous"):
        torchrun_words("tiny", nodes=2)
    assert "--rdzv-endpoint=a:1" in torchrun_words("tiny", nodes=2, rendezvous="a:1")


def test_a_word_that_is_no_override_is_refused():
    with pytest.raises(UsageError, match=r"key\.path=value"):
        torchrun_words("tiny", ["steps"])


@pytest.mark.slow
def test_the_launchers_accept_the_words():
    torch_help = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True
    )
    options = {w.split("=")[0] for w in torchrun_words("r", nodes=2, rendezvous="a:1") if w.startswith("--")}
    assert all(option in torch_help.stdout for option in options)
    pytest.importorskip("deepspeed")
    code = (
        "from deepspeed.launcher.runner import parse_args\n"
        f"a = parse_args({deepspeed_words('r', ['a=b'], hostfile='h')[1:]!r})\n"
        "assert (a.module, a.no_local_rank, a.user_script, a.user_args, a.num_gpus) == "
        "(True, True, 'megatron_inherit', ['train', 'r', 'a=b'], 1), a\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
