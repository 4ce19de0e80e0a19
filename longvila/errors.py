"""Errors a user can act on. The command line prints them as one line; everything else keeps its traceback."""


class LongvilaError(Exception):
    """Base of every error caused by input: configuration, files, data, environment.

    The message names the thing, gives the numbers and says the way out.
    """


class ConfigError(LongvilaError):
    """A configuration that cannot run as written. Always fatal, always before any step."""


class DataError(LongvilaError):
    """One sample, file or shard that cannot be used. Counted and skipped while streaming, up to a bound."""


class MediaError(DataError):
    """A video or image that cannot be probed or decoded."""
