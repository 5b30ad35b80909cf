"""The same run anywhere: what a target is given, and what runs on its hosts."""
