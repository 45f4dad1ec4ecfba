import os
import time

from megatron_inherit.train.run_folder import process_start


def test_a_killed_process_that_nobody_has_waited_for_holds_no_lock():
    pid = os.fork()
    if not pid:
        os._exit(0)
    try:
        deadline = time.monotonic() + 10
        while process_start(pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.path.exists(f"/proc/{pid}/stat")
        assert process_start(pid) is None
    finally:
        os.waitpid(pid, 0)
    assert process_start(os.getpid()) is not None
