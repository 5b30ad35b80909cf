"""From a source of rows to batches: source → tokenize → prepare → batches. `sft` holds the guide's own entry points."""
