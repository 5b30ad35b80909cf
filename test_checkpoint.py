"""Score the tuned model on held-out rows: the guide's command, the same as `manta evaluate`."""

from manta.__main__ import main

if __name__ == "__main__":
    main("evaluate")
