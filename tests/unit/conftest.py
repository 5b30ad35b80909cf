import os

# Before any library reads it: a unit test that reaches for the hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
