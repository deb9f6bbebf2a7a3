"""Decoders assembled from config, and their Hugging Face import and export."""
