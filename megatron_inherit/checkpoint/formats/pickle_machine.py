"""A pickle interpreter that can build data and nothing else.

A pickle is a program for a stack machine; Python's own machine calls whatever callable the program names. This one has
no such instruction: a global stays a name (:class:`Global`), calling it gives a record of the call (:class:`Opaque`)
unless a caller-supplied pure function stands for it, and setting its state fills that record. Nothing is imported.
Opcodes as in Python's ``pickletools``, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_PICKLE_BYTES = 64 << 20
"""Longest pickle read: the metadata of a checkpoint with 300,000 pieces stays below it."""

_MAX_STACK = 1 << 18


class PickleRefusedError(Exception):
    """The program is damaged, too long, or names or does something no checkpoint needs."""


@dataclass(frozen=True)
class Global:
    """A class or function a pickle names; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


MEMBER = Global("builtins", "getattr")
"""How Python 3.11.0 to 3.11.3 pickle a member of an enumeration: by its class and its name, not by its value."""


@dataclass(eq=False)
class Opaque:
    """An object of a class that is only recorded: what was called, with what, and the state set afterwards."""

    kind: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """Attributes by name, empty where the state is not a plain attribute dictionary."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state if isinstance(state, dict) else {}


@dataclass(frozen=True)
class Hooks:
    """What may stand behind a name.

    Attributes:
        allow: Tells whether a global may be named at all.
        calls: Pure functions for the globals that stand for data; the others become :class:`Opaque`.
        persistent: Resolves a persistent id.
    """

    allow: Callable[[Global], bool]
    calls: Mapping[Global, Callable[..., Any]] = field(default_factory=dict)
    persistent: Callable[[Any], Any] | None = None


class _Mark:
    """Separates the operands of the opcodes that take a variable number."""


_MARK = _Mark()


class Machine:
    """Runs one pickle.

    Args:
        data: Buffer that holds it: bytes or a memory map.
        hooks: What its names mean.
        start: Where it begins in the buffer.
        end: One past the last byte it may use; the end of the buffer by default.
    """

    def __init__(self, data: Any, hooks: Hooks, *, start: int = 0, end: int | None = None) -> None:
        self._data, self._hooks = data, hooks
        self.position = start
        self._end = len(data) if end is None else end
        self._limit = min(self._end, start + MAX_PICKLE_BYTES)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Gives the value; ``position`` is then the byte after it.

        Raises:
            PickleRefusedError: See there; the message names the global or the opcode.
        """
        try:
            return self._run()
        except PickleRefusedError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
            raise PickleRefusedError(f"the pickle is damaged near byte {self.position}") from error

    def _run(self) -> Any:
        data, stack = self._data, self._stack
        while self.position < self._limit:
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                return stack.pop()
            action = _ACTIONS.get(code)
            if action is None:
                raise PickleRefusedError(f"pickle opcode {bytes([code])!r} is not used by checkpoints")
            action(self)
            if len(stack) > _MAX_STACK:
                raise PickleRefusedError("the pickle nests or lists more than a checkpoint does")
        longer = self._limit < self._end
        raise PickleRefusedError(f"it is longer than {MAX_PICKLE_BYTES} bytes" if longer else "it is truncated")

    def take(self, count: int) -> bytes:
        """Gives the next bytes of the program."""
        end = self.position + count
        if end > self._limit:
            raise PickleRefusedError("the pickle is truncated or names a length beyond its end")
        found: bytes = self._data[self.position : end]
        self.position = end
        return found

    def number(self, width: int) -> int:
        """Gives the next little-endian unsigned number."""
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        """Gives the text up to the next newline."""
        end = self._data.find(b"\n", self.position, self._limit)
        if end < 0:
            raise PickleRefusedError("the pickle is truncated")
        text = bytes(self._data[self.position : end]).decode("utf-8", "replace")
        self.position = end + 1
        return text

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Takes the value on top of the stack."""
        return self._stack.pop()

    def top(self) -> Any:
        """Shows the value on top of the stack."""
        return self._stack[-1]

    def since_mark(self) -> list[Any]:
        """Takes everything above the newest mark, and the mark."""
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleRefusedError("the pickle has no mark where it needs one")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def memoize(self, key: int | None = None) -> None:
        """Remembers the value on top of the stack."""
        self._memo[len(self._memo) if key is None else key] = self._stack[-1]

    def recall(self, key: int) -> None:
        """Pushes a remembered value."""
        self._stack.append(self._memo[key])

    def push_global(self, module: str, name: str) -> None:
        """Pushes a name that the hooks allow."""
        found = Global("builtins" if module == "__builtin__" else module, name)
        if not self._hooks.allow(found):
            raise PickleRefusedError(f"the pickle names {found}, which no checkpoint needs")
        self._stack.append(found)

    def call(self, target: Any, args: Any) -> None:
        """Pushes what stands for a call: data for known names, a record for allowed ones."""
        if not isinstance(target, Global) or not isinstance(args, tuple):
            raise PickleRefusedError("the pickle calls something that is not a named class or function")
        if target == MEMBER and not _is_member(args):
            raise PickleRefusedError("the pickle takes an attribute of something that is not a named class")
        function = self._hooks.calls.get(target)
        self._stack.append(Opaque(target, args) if function is None else function(*args))

    def build(self, state: Any) -> None:
        """Sets the state of the object on top: recorded for records, left out for plain data."""
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.state = state

    def extend(self, items: list[Any]) -> None:
        """Adds items to the list, set or record on top."""
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise PickleRefusedError("the pickle appends to something that is not a list")

    def set_items(self, items: list[Any]) -> None:
        """Adds keys and values, in turn, to the dictionary or record on top."""
        target = self._stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, Opaque):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise PickleRefusedError("the pickle sets items of something that is not a dictionary")

    def resolve(self, key: Any) -> None:
        """Pushes what a persistent id stands for."""
        if self._hooks.persistent is None:
            raise PickleRefusedError("the pickle refers to storage outside it")
        self._stack.append(self._hooks.persistent(key))


def _is_member(args: tuple[Any, ...]) -> bool:
    return len(args) == 2 and isinstance(args[0], Global) and isinstance(args[1], str) and args[1].isidentifier()


_STOP = ord(".")
_Action = Callable[[Machine], None]


def _tuple(size: int) -> _Action:
    def act(machine: Machine) -> None:
        items = [machine.pop() for _ in range(size)]
        machine.push(tuple(reversed(items)))

    return act


def _text(width: int) -> _Action:
    return lambda m: m.push(bytes(m.take(m.number(width))).decode("utf-8", "surrogatepass"))


def _bytes(width: int) -> _Action:
    return lambda m: m.push(bytes(m.take(m.number(width))))


def _legacy_text(width: int) -> _Action:
    return lambda m: m.push(bytes(m.take(m.number(width))).decode("latin-1"))


def _signed(width_of_length: int) -> _Action:
    return lambda m: m.push(int.from_bytes(m.take(m.number(width_of_length)), "little", signed=True))


def _call(machine: Machine) -> None:
    args = machine.pop()
    machine.call(machine.pop(), args)


def _call_with_keywords(machine: Machine) -> None:
    keywords, args = machine.pop(), machine.pop()
    target = machine.pop()
    if keywords:
        machine.call(target, (*args, keywords))
    else:
        machine.call(target, args)


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleRefusedError("the pickle names a global that is not text")
    machine.push_global(module, name)


def _set_one(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _pop(machine: Machine) -> None:
    machine.pop()


def _pop_marked(machine: Machine) -> None:
    machine.since_mark()


def _dict(machine: Machine) -> None:
    items = machine.since_mark()
    machine.push(dict(zip(items[::2], items[1::2], strict=True)))


def _append(machine: Machine) -> None:
    value = machine.pop()
    machine.extend([value])


def _state(machine: Machine) -> None:
    state = machine.pop()
    machine.build(state)


_ACTIONS: dict[int, _Action] = {
    ord(code): action
    for code, action in {
        "\x80": lambda m: _skip(m, 1),
        "\x95": lambda m: _skip(m, 8),
        "(": lambda m: m.push(_MARK),
        "0": _pop,
        "1": _pop_marked,
        "2": lambda m: m.push(m.top()),
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "J": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
        "K": lambda m: m.push(m.number(1)),
        "M": lambda m: m.push(m.number(2)),
        "\x8a": _signed(1),
        "\x8b": _signed(4),
        "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        "U": _legacy_text(1),
        "T": _legacy_text(4),
        "C": _bytes(1),
        "B": _bytes(4),
        "\x8e": _bytes(8),
        "\x96": _bytes(8),
        "\x8c": _text(1),
        "X": _text(4),
        "\x8d": _text(8),
        ")": lambda m: m.push(()),
        "t": lambda m: m.push(tuple(m.since_mark())),
        "\x85": _tuple(1),
        "\x86": _tuple(2),
        "\x87": _tuple(3),
        "]": lambda m: m.push([]),
        "l": lambda m: m.push(m.since_mark()),
        "a": _append,
        "e": lambda m: m.extend(m.since_mark()),
        "}": lambda m: m.push({}),
        "d": _dict,
        "s": _set_one,
        "u": lambda m: m.set_items(m.since_mark()),
        "\x8f": lambda m: m.push(set()),
        "\x90": lambda m: m.extend(m.since_mark()),
        "\x91": lambda m: m.push(frozenset(m.since_mark())),
        "q": lambda m: m.memoize(m.number(1)),
        "r": lambda m: m.memoize(m.number(4)),
        "\x94": lambda m: m.memoize(),
        "h": lambda m: m.recall(m.number(1)),
        "j": lambda m: m.recall(m.number(4)),
        "c": lambda m: m.push_global(m.line(), m.line()),
        "\x93": _stack_global,
        "R": _call,
        "\x81": _call,
        "\x92": _call_with_keywords,
        "b": _state,
        "Q": lambda m: m.resolve(m.pop()),
    }.items()
}


def _skip(machine: Machine, count: int) -> None:
    machine.take(count)
