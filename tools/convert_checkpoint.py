"""Converts checkpoints between formats and layouts; the same as ``minherit convert``, where Megatron users look."""

import sys

from megatron_inherit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
