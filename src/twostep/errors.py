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


class MissingExtraError(UserError, ImportError):
    """Something that was asked for needs packages that are not installed."""


def missing_extra(extra: str, error: ImportError, *, option: str) -> MissingExtraError:
    """The error to raise where an optional import failed.

    Args:
        extra: of this package, which brings what is missing.
        option: what asked for it, as the user typed it.
    """
    return MissingExtraError(
        f'{option} needs this package\'s extra "{extra}", for instance '
        f'`pip install -e ".[{extra}]"` in a checkout; {error.name or error} is missing'
    )
