"""The demonstration: every room of longctx, once, on this machine."""
