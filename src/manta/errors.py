"""The errors that are messages: what happened, why, and what to type next."""


class UserError(Exception):
    """Something the user can mend. The command line prints the message alone and exits with 2."""


class ConfigError(UserError, ValueError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another."""


class HeldError(UserError):
    """A run that another driver has."""


class TrainingError(Exception):
    """A run that started and did not finish. The command line prints the message alone and exits with 1."""


class InterruptedRunError(TrainingError):
    """A run that Ctrl-C, or the stop button of a notebook, ended: it goes on from its last checkpoint."""


class NonFiniteError(TrainingError):
    """A gradient that is NaN or infinite: repeating the step would repeat it, so it is never retried."""


class StorageError(TrainingError):
    """A checkpoint that could not be written, after several tries: what was saved before is as it was."""
