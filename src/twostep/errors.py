"""Errors that are the user's to mend; those of a single room stand where they arise."""


class UserError(Exception):
    """Shown by the command line as one message, without a traceback."""

    exit_code = 2


class RecipeError(UserError, ValueError):
    """A recipe that cannot be used; the message names the key, the value and what is allowed."""


class ModelError(UserError, ValueError):
    """A model folder that cannot be used; the message says what was expected."""


class ExportError(ModelError):
    """An export that cannot be made."""


class InputError(UserError, ValueError):
    """An argument that cannot be used; the message names it."""
