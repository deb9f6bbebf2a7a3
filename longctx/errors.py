"""Errors a user can act on.

Every error raised for bad input derives from :class:`LongctxError`; the command line prints its one sentence and
exits with status 2. Anything else is a defect in longctx and keeps its traceback.
"""


class LongctxError(Exception):
    """Bad input: the message says what, where and what to do."""


class ConfigError(LongctxError):
    """A configuration file, override or combination of settings cannot be used."""


class DataError(LongctxError):
    """A corpus, tokenizer, shard or mixture cannot be used."""


class CheckpointError(LongctxError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class UnsupportedError(LongctxError):
    """An option that this path cannot honour; the message names the option and the alternatives."""


class LaunchError(LongctxError):
    """The processes of a run were started in a way that cannot work."""


def first_line(error: Exception) -> str:
    """What a library's error says, short enough for a sentence of ours."""
    return str(error).strip().partition("\n")[0]
