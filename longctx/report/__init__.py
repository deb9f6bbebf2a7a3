"""What a run leaves behind for people: the progress line, plots and one HTML page, all made from metrics.jsonl."""
