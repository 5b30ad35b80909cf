"""Where `manta` and the guide's scripts begin."""

import sys

from manta import heap


def main(*verb: str) -> None:
    """`manta` with this process's arguments, after `verb` where a script is for one."""
    arguments = [*verb, *sys.argv[1:]]
    if arguments[:1] in (["train"], ["demo"], ["plan"]):  # they train, or foresee what a process that trains takes
        heap.begin_again()
    from manta import cli

    cli.main(arguments, prog_name="manta")


if __name__ == "__main__":
    main()
