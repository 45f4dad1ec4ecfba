"""``python -m megatron_inherit``."""

from megatron_inherit.cli.main import run

if __name__ == "__main__":
    run()
