"""Fine-tune: the guide's command, the same as `manta train`."""

from manta.cli import run_verb

if __name__ == "__main__":
    run_verb("train")
