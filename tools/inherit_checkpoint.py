"""Makes a student out of a teacher's blocks; the same as ``minherit inherit``, where Megatron users look."""

import sys

from megatron_inherit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["inherit", *sys.argv[1:]]))
