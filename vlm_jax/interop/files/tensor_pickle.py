"""The pickles in which PyTorch describes tensors, read by their opcodes: nothing is looked up, called or built.

A pickle is a program for a small machine with a stack, and `pickletools` says what each opcode is. Those that describe dicts,
lists and tensors are followed here; a name that is not part of a tensor's description, and every other opcode, is refused.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.table import Shape

DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
TENSOR, PARAMETER, DICT = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"
KNOWN = {TENSOR, PARAMETER, DICT} | {f"torch {name}" for name in DTYPES}
ADVICE = "Use the checkpoint's safetensors files instead"
DEEPEST, MOST = 64, 200_000  # levels and entries of nested dicts
AXES = 32  # NumPy's limit

# Opcodes that put their argument, or always the same, on the stack.
ARGUMENTS = re.compile("(LONG_?|SHORT_)?(BIN)?(INT|LONG|FLOAT|STRING|UNICODE|BYTES)[1248]?")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Name(NamedTuple):
    """A name of Python's that stands in the pickle: module and name with a space between them."""

    name: str


class Storage(NamedTuple):
    key: str
    dtype: np.dtype
    length: int  # numbers


class Described(NamedTuple):
    """A tensor's place in a storage."""

    storage: Storage
    offset: int
    shape: Shape
    strides: Shape  # in numbers


def read_pickle(content: bytes) -> Any:
    """Dicts, lists and tuples of `Described`, text and numbers.

    Raises:
      PublishedError: it names anything but tensors; ValueError, LookupError, TypeError: it is damaged.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, argument)
    raise ValueError("it has no end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks that marks have covered
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "POP":
                stack.pop()
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "LIST" | "TUPLE" | "APPENDS" | "SETITEMS" | "DICT":
                self._add(name, self._marked())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                self._add("APPENDS", [stack.pop()])
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._add("SETITEMS", [key, value])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_known(argument))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(_known(f"{_checked(module, str)} {_checked(last, str)}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, called = _checked(stack.pop(), tuple), _checked(stack.pop(), Name)
                stack.append(_made(called.name, arguments))
            case "BUILD":  # attributes, such as the versions that PyTorch gives a dict of parameters
                stack.pop()
                _checked(stack[-1], dict)
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case _ if ARGUMENTS.fullmatch(name):
                stack.append(argument)
            case _:
                raise PublishedError(f"it has the opcode {name}, which describes no tensor. {ADVICE}")

    def _marked(self) -> list[Any]:
        """What lies above the last mark, which is taken away."""
        found, self.stack = self.stack, self.below.pop()
        return found

    def _add(self, name: str, found: list[Any]) -> None:
        """
        Args:
          found: values, or keys and values in turn.
        """
        stack = self.stack
        if name in ("LIST", "TUPLE"):
            stack.append(found if name == "LIST" else tuple(found))
        elif name == "APPENDS":
            _checked(stack[-1], list).extend(found)
        else:
            if name == "DICT":
                stack.append({})
            _checked(stack[-1], dict).update(_pairs(found))


def _pairs(found: list[Any]) -> dict[Any, Any]:
    # Only these: to look up a tuple that is nested deeply would overflow Python's own stack.
    return {_checked(key, str | int): value for key, value in zip(found[::2], found[1::2], strict=True)}


def _known(name: str) -> Name:
    if name not in KNOWN:
        raise PublishedError(f"it would run {name.replace(' ', '.')}, which is not a tensor. {ADVICE}")
    return Name(name)


def _checked(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"found {type(value).__name__}, expected {getattr(kind, '__name__', kind)}")
    return value


def _storage(identifier: Any) -> Storage:
    match identifier:
        case ("storage", Name(name), str(key), str(), int(length)) if name.removeprefix("torch ") in DTYPES:
            return Storage(key, np.dtype(DTYPES[name.removeprefix("torch ")]), length)
    raise ValueError("unknown storage")


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call of that name describes."""
    if name == TENSOR:
        return _tensor(*arguments)
    if name == PARAMETER:
        return _checked(arguments[0], Described)
    if name == DICT:
        return _pairs([one for pair in (arguments[0] if arguments else ()) for one in pair])
    raise ValueError(f"{name} is called")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Described:
    sizes, steps = tuple(_checked(shape, tuple | list)), tuple(_checked(strides, tuple | list))
    numbers = (offset, *sizes, *steps)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or not len(sizes) == len(steps) <= AXES:
        raise ValueError("a tensor of a shape that there is not")
    return Described(_checked(storage, Storage), offset, sizes, steps)


def tensors_of(content: Any) -> Iterator[tuple[str, Described]]:
    """Name and tensor, the names of nested dicts joined with dots.

    Numbers and lists beside them, such as an epoch, are no weights and left out.

    Raises:
      PublishedError: dicts that are nested too deeply, or contain themselves.
    """
    rest, count = [("", content, 0)], 0
    while rest:
        name, value, depth = rest.pop()
        count += 1
        if depth > DEEPEST or count > MOST:
            raise PublishedError(f"it holds dicts nested more than {DEEPEST} deep, or with more than {MOST:,} entries")
        if isinstance(value, Described):
            yield name, value
        elif isinstance(value, dict):
            inner = [(f"{name}.{key}" if depth else str(key), part, depth + 1) for key, part in value.items()]
            rest += reversed(inner)
