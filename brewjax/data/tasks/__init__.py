"""What is asked: `task` declares a ranking task in YAML, `examples` makes point-in-time correct ranking examples (one
context and its candidates) from the events of a dataset."""
