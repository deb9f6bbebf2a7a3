"""Checkpoints: by parameter name, independent of ZeRO stage and degrees, safetensors and JSON only."""
