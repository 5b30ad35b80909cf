"""Fine-tune: the guide's command, the same as `manta train`."""

from manta.__main__ import main

if __name__ == "__main__":
    main("train")
