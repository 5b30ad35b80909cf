"""Write the best checkpoint as a Hugging Face folder: the guide's command, the same as `manta convert`."""

from manta.cli import run_verb

if __name__ == "__main__":
    run_verb("convert")
