"""The one kind of error that a command shows as a single line."""


class UserError(ValueError):
    """Something that the user can mend: an option, a file, a missing package, an impossible combination.

    The message is one line that names the option or file, its value and what to do instead. Commands print it
    and exit with status 2 (`ssm_retrieval.cli.guarded`). Every other exception is a bug and keeps its
    traceback."""


class MissingPackage(UserError, ImportError):
    """An optional package is absent, too old or does not load; the message has the pip command."""
