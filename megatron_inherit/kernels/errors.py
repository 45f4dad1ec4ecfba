"""What a kernel says about bad input: which tensor, what came, what was expected."""

from __future__ import annotations


def _message(what: str, got: object, expected: object) -> str:
    parts = [what]
    if got is not None:
        parts.append(f"Got: {got}.")
    if expected is not None:
        parts.append(f"Expected: {expected}.")
    return " ".join(parts)


class KernelValueError(ValueError):
    """A shape, a device, a number or an environment variable does not fit."""

    def __init__(self, what: str, *, got: object = None, expected: object = None) -> None:
        self.what, self.got, self.expected = what, got, expected
        super().__init__(_message(what, got, expected))


class KernelTypeError(TypeError):
    """A tensor has a dtype that no implementation takes."""

    def __init__(self, what: str, *, got: object = None, expected: object = None) -> None:
        self.what, self.got, self.expected = what, got, expected
        super().__init__(_message(what, got, expected))
