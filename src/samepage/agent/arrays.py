"""Memory for numpy's arrays from the agent, in a process in which it was not preloaded (`agent/hooks/numpy.c`)."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

from samepage import agent

# PyDataMem_SetHandler and PyDataMem_GetHandler in numpy's table of C functions, the same in all versions since 1.22.
_SET_HANDLER, _GET_HANDLER = 304, 305

NAME = "samepage"
"""Of the handler (`numpy._core.multiarray.get_handler_name`)."""

_ours: dict[int, Any] = {}
"""Our handler for each that was there before, by its address. A thread is given one of these, never a new one."""


def serve_arrays() -> None:
    """From now on the large arrays that this thread makes with numpy are the agent's, also in children it forks. Those
    that it made before stay where they are."""
    get = _numpys(_GET_HANDLER, ctypes.py_object)
    change = _numpys(_SET_HANDLER, ctypes.py_object, ctypes.py_object)
    current = get()
    if _core().get_handler_name() == NAME:
        return
    address, name = (
        _of_capsule("PyCapsule_GetPointer", current, b"mem_handler"),
        _of_capsule("PyCapsule_GetName", current),
    )
    if address not in _ours:
        _ours[address] = _capsule(address, name, current)
    change(_ours[address])


def _capsule(before: int, name: int, keep: Any) -> Any:
    """A capsule with our handler, for the blocks that are not large in front of the one at `before`."""
    make = agent.load().samepage_array_handler
    make.argtypes, make.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_void_p
    handler = make(before, _huge_pages())
    if not handler:
        raise OSError("numpy has a memory handler of a version that samepage does not know")
    new = ctypes.pythonapi.PyCapsule_New
    new.argtypes, new.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p), ctypes.py_object
    ours = new(handler, name, None)
    for forever in (keep, ours):  # arrays outlive this module when Python ends
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(forever))
    return ours


def _numpys(number: int, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of numpy's C API."""
    table = _of_capsule("PyCapsule_GetPointer", _core()._ARRAY_API, None)
    functions = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))
    return ctypes.PYFUNCTYPE(result, *arguments)(functions[number])


def _of_capsule(function: str, capsule: Any, *name: bytes | None) -> int:
    ask = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, *[ctypes.c_char_p] * len(name))
    found: int = ask((function, ctypes.pythonapi))(capsule, *name)
    return found


def _core() -> Any:
    """The module with what numpy is made of; before numpy 2 it had another name."""
    try:
        return importlib.import_module("numpy._core.multiarray")
    except ImportError:
        return importlib.import_module("numpy.core.multiarray")


def _huge_pages() -> bool:
    """Whether numpy advises the kernel to use huge pages for large arrays."""
    asked = getattr(_core(), "_get_madvise_hugepage", None)  # numpy 2
    return bool(asked()) if asked else True
