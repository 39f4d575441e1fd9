"""The base of every error that is the user's to mend."""


class UserError(Exception):
    """Shown by the command line as one message, without a traceback."""

    exit_code = 2
