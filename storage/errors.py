"""The project's own exceptions.

Each also derives from the built-in exception that a caller of a library would expect, so that ``except ValueError``
keeps working. A message says what happened, what was got, what was expected and what to do now, in one or two lines.
"""

from __future__ import annotations

AFTER_DAMAGE = "segkd cache verify lists all damage, segkd cache repair writes it again"
"""What to do about a cache with damage, as its messages say it."""


class SegkdError(Exception):
    """Base of every error that segkd raises on purpose. ``exit_status`` is what the command line ends with."""

    exit_status = 2


class ConfigError(SegkdError, ValueError):
    """A run file, an option or a description is wrong: the place, what stands there and the remedy."""


class DataError(SegkdError, ValueError):
    """An image or a label map cannot be used: the file, what is wrong with it and the remedy."""

    exit_status = 1


class GeometryError(SegkdError, ValueError):
    """A grid of cells does not fit the image or the description of the network."""


class CacheError(SegkdError):
    """Something about a cache is not as it must be."""

    exit_status = 1


class CacheNotFoundError(CacheError, FileNotFoundError):
    """There is no cache where one was expected."""


class CacheExistsError(CacheError, FileExistsError):
    """There is already something else where a cache was to be written."""


class CacheMismatchError(CacheError, ValueError):
    """The cache is of another teacher, preprocessing, classes, coding or list of samples than what was asked for."""


class CacheDamagedError(CacheError, OSError):
    """Bytes of a cache are missing or not those that were written."""


class CacheChangedError(CacheError):
    """The cache was written anew while it was open: what was read of it before does not belong to what is there now."""


class IncompleteCacheError(CacheError):
    """The cache is not finished and partial use was not asked for."""


class NetworkError(SegkdError, ValueError):
    """A network reference cannot be resolved, or the network does not behave as it is described."""


class ExportError(SegkdError, ValueError):
    """A network cannot be written as a program, or the program does not answer as the network does."""

    exit_status = 1


class NonFiniteError(SegkdError, ArithmeticError):
    """A NaN or an infinity appeared where only finite numbers make sense."""

    exit_status = 1


class ContaminationError(SegkdError, ValueError):
    """Samples of role select or report would reach a network that must not see them."""


class OutputExistsError(SegkdError, FileExistsError):
    """The command would overwrite something and ``--overwrite`` was not given."""


class CheckpointError(SegkdError, ValueError):
    """A checkpoint cannot be read or does not belong to this run."""

    exit_status = 1


class ProcessError(SegkdError, ConnectionError):
    """The processes of one run cannot work together: one of them is gone, or never came."""

    exit_status = 1


class RecordError(SegkdError, ValueError):
    """A record of a finished run cannot be read, or is of another run than the one asked for."""

    exit_status = 1
