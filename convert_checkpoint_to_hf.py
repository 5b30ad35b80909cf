"""Write the best checkpoint as a Hugging Face folder: the guide's command, the same as `manta convert`."""

from manta.__main__ import main

if __name__ == "__main__":
    main("convert")
