"""Score the tuned model on held-out rows: the guide's command, the same as `manta evaluate`."""

from manta.cli import run_verb

if __name__ == "__main__":
    run_verb("evaluate")
