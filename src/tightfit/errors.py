"""The errors a user can meet. Every message names the value, the rule and the next step."""


class TightfitError(Exception):
    """Base of all errors that tightfit raises on purpose; `exit_code` is the command line's."""

    exit_code = 2


class ConfigError(TightfitError):
    """A configuration file, key or value that cannot be used."""


class DataError(TightfitError):
    """A dataset, token file or vocabulary that is missing or broken."""


class CheckpointError(TightfitError):
    """A checkpoint that is missing, cut, altered, unsafe or of another model."""


class DeviceError(TightfitError):
    """A device or number format that this machine or this build of torch does not have."""


class CannotSave(TightfitError):
    """A state that could not be written to disk."""

    exit_code = 1


class DoesNotFit(TightfitError):
    """A run that needs more memory, host memory or disk than there is."""

    exit_code = 1
