"""The exceptions a user can meet, each with the exit code that the command line promises for it."""

from __future__ import annotations


class MinheritError(Exception):
    """A failure with one plain message: what, where, got, expected, what to do.

    Args:
        what: One sentence that says what failed and where (file, tensor, key path).
        got: The value found, if there is one.
        expected: The value that would have been right.
        fix: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str = "") -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        parts = [what]
        if got is not None:
            parts.append(f"Got: {got}.")
        if expected is not None:
            parts.append(f"Expected: {expected}.")
        if fix:
            parts.append(fix)
        super().__init__(" ".join(parts))


class UsageError(MinheritError):
    """The command line cannot be understood."""

    exit_code = 2


class ConfigError(MinheritError):
    """A recipe, a study or an override is wrong."""

    exit_code = 3


class PlanError(ConfigError):
    """A transfer plan is not total: a student tensor without a source, a teacher tensor unaccounted for."""


class DataError(MinheritError):
    """Text, tokenizer or token files are missing, damaged or do not fit the model."""

    exit_code = 4


class CheckpointError(MinheritError):
    """A checkpoint is missing, damaged, of an unknown format or does not fit."""

    exit_code = 5


class AbsentError(CheckpointError):
    """A checkpoint has no such tensor; one that is there and cannot be read is a plain CheckpointError."""


class DivergedError(MinheritError):
    """Training met repeated non-finite or exploding losses and gave up."""

    exit_code = 6


class DiskError(MinheritError):
    """A file system is too full or not writable."""

    exit_code = 7


class PreemptedError(MinheritError):
    """A signal asked the run to stop and its state is saved: requeue it."""

    exit_code = 75


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""
