"""Where `manta` begins."""

import sys

from manta import heap


def main() -> None:
    if sys.argv[1:2] in (["train"], ["plan"]):  # they train, or foresee what a process that trains takes
        heap.begin_again()
    from manta import cli

    cli.main()


if __name__ == "__main__":
    main()
