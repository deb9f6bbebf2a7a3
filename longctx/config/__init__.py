"""The typed configuration of a run: schema, loading, checking. Imports no torch."""
