"""Pickles from elsewhere: nothing in them is executed, and none can exhaust the process that reads it.

A restricted `find_class` stops code. It does not stop two other attacks, which `scan` finds in the opcodes
before anything is loaded: tuples nested so deep, or repeated so often, that hashing one (as the key of a
dictionary) overflows C's stack or never ends; and memo numbers that make the unpickler reserve gigabytes.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import Any, ClassVar

MOST_DEPTH, MOST_PARTS = 32, 1000  # of tuples within one tuple
MOST_OPCODES = 50_000_000
MEMO_SLACK = 2**20  # memo numbers may leave gaps

# How deep the tuples of an item on the stack are nested, and how many they are; 0 for what is in none.
_Nesting = tuple[int, int]
_FLAT = 0
_TUPLES = {"TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "EMPTY_TUPLE": 0}
_PUSH, _GET, _PUT, _OTHER, _MARK, _TUPLE, _POP, _STOP = range(8)
_ACTIONS = {"MARK": _MARK, "POP": _POP, "STOP": _STOP, **dict.fromkeys(_TUPLES, _TUPLE)}
_ACTIONS |= dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _GET)
_ACTIONS |= dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _PUT)


def _effect(opcode: Any) -> tuple[int, int, bool, int, int, str]:
    """Action, argument's size as in pickletools, whether it pops to a mark, items popped, pushed, name."""
    before, pushed = opcode.stack_before, len(opcode.stack_after)
    marked = pickletools.markobject in before
    popped = before.index(pickletools.markobject) if marked else len(before)
    size = 0 if opcode.arg is None else opcode.arg.n
    usual = _PUSH if not before and pushed == 1 else _OTHER
    return _ACTIONS.get(opcode.name, usual), size, marked, popped, pushed, opcode.name


_EFFECTS = {ord(opcode.code): _effect(opcode) for opcode in pickletools.opcodes}


class NoPickle(pickle.UnpicklingError):
    """The file ends too early, or is no pickle."""


def scan(data: Any, start: int = 0, most: int = MOST_OPCODES) -> int:
    """Find the end of a pickle.

    Args:
        data: Bytes or a mapped file.
        start: Where the pickle begins.
        most: How many opcodes it may have.

    Returns:
        Where it ends.

    Raises:
        NoPickle: If there is no pickle.
        pickle.UnpicklingError: If it is built to do harm: tuples nested too deep, a memo too large, too many
            opcodes. The text says which.
    """
    try:
        return _scan(data, start, most)
    except (IndexError, KeyError, ValueError) as error:
        raise NoPickle("it is cut short or no pickle") from error


def _scan(data: Any, at: int, most: int) -> int:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    effects, length, find = _EFFECTS, len(data), data.find
    for count in range(most):
        action, size, marked, popped, pushed, name = effects[data[at]]
        if size >= 0:
            end = at + 1 + size
        elif size == pickletools.UP_TO_NEWLINE:
            end = find(b"\n", at) + 1 or length + 1
            if name == "GLOBAL" or name == "INST":
                end = find(b"\n", end) + 1 or length + 1
        else:
            end = _end(data, at, size)
        if action == _PUSH:
            stack.append(_FLAT)
        elif action == _PUT:
            number = len(memo) if name == "MEMOIZE" else _number(data[at + 1 : end], name)
            if not 0 <= number <= MEMO_SLACK + 2 * count:
                raise pickle.UnpicklingError(f"its memo has a number {number}, far beyond its contents")
            memo[number] = stack[-1]
        elif action == _GET:
            stack.append(memo[_number(data[at + 1 : end], name)])
        elif action == _MARK:
            marks.append(len(stack))
        elif action == _POP and marks and marks[-1] == len(stack):
            marks.pop()
        elif action == _STOP:
            return end
        else:
            number = _TUPLES[name] if action == _TUPLE else popped
            first = (marks.pop() if marked else len(stack)) - number
            if first < 0:
                raise IndexError
            nested = [item for item in stack[first:] if item]
            del stack[first:]
            if action == _TUPLE:
                stack.append(_tuple(nested))
            elif pushed:
                # a result may be what went in (a `BUILD` without state): it counts as the deepest of that
                deepest = (max(i[0] for i in nested), max(i[1] for i in nested)) if nested else _FLAT
                stack.extend([deepest] * pushed)
        at = end
    raise pickle.UnpicklingError(f"it has more than {most:,} opcodes")


def _tuple(nested: list[_Nesting]) -> _Nesting:
    depth = 1 + max((item[0] for item in nested), default=0)
    parts = 1 + sum(item[1] for item in nested)
    if depth > MOST_DEPTH or parts > MOST_PARTS:
        raise pickle.UnpicklingError(
            f"it nests tuples more than {MOST_DEPTH} deep, or more than {MOST_PARTS:,} in one"
        )
    return depth, parts


def _end(data: Any, at: int, size: int) -> int:
    """Where an opcode ends whose argument begins with its length."""
    width = _WIDTHS[size]
    return at + 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "little")


_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _number(argument: bytes, name: str) -> int:
    """Of a memo: the protocols before 1 write it as text."""
    return int(argument) if name in ("GET", "PUT") else int.from_bytes(argument, "little")


class Restricted(pickle.Unpickler):
    """Knows the classes of `known`, by module and name, and refuses every other before it is imported."""

    known: ClassVar[dict[tuple[str, str], Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it has persistent ids")


class Plain(Restricted):
    """Containers, text and numbers only."""

    known: ClassVar[dict[tuple[str, str], Any]] = {
        (module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)
    }
