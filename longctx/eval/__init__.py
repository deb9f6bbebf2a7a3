"""Measures what a model does with its context: perplexity by position and needle retrieval."""
