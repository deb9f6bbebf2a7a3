"""Text to tokens to training rows: tokenizers, corpus building, memory-mapped shards, mixtures and packing."""
