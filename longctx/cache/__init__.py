"""What decoding keeps: keys and values in blocks, with a length of its own for every row and kv head."""
