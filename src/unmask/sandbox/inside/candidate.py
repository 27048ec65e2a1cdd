"""The process that runs a program which is not trusted, and answers calls to what it defines.

Requests name a function and carry arguments; answers carry a value, or the class and text of an exception, and where it
is asked for the arguments as they are afterwards. Objects that cannot be sent stay here under a number. Everything in
this process belongs to the program: what it answers is a claim.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from typing import Any

from channel import receive, send
from wire import Encoder, WireError, decode_tree


class Candidate:
    """The program's names and kept objects, behind one socket."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        module = types.ModuleType("solution")  # dataclasses look for the module of a class
        sys.modules["solution"] = module
        self.names: dict[str, Any] = vars(module)
        self.names["__builtins__"] = builtins
        self.kept: list[Any] = []
        self.encoder = Encoder(self.keep)
        self.given: Any = None

    def keep(self, value: Any) -> int:
        for number, kept in enumerate(self.kept):
            if kept is value:
                return number
        self.kept.append(value)
        return len(self.kept) - 1

    def load(self, source: str) -> None:
        """Run the program once, and say how that went."""
        try:
            exec(compile(source.removeprefix("\ufeff"), "<solution>", "exec", dont_inherit=True), self.names)
            self.answer({"loaded": True})
        except BaseException as error:
            self.answer(failure(error))

    def serve(self) -> None:
        while True:
            try:
                request = json.loads(receive(self.descriptor))
            except (EOFError, OSError):
                os._exit(0)
            self.given = None
            try:
                found = {"value": self.encoder.tree(self.perform(request), 0)}
            except BaseException as error:
                found = failure(error)
            self.answer(found | self.edited() if request.get("back") else found)

    def perform(self, request: dict[str, Any]) -> Any:
        """{"name"} or {"of": handle, "name"} finds a thing; with "arguments" it is called."""
        if "of" in request:
            found = getattr(self.kept[request["of"]], request["name"]) if request["name"] else self.kept[request["of"]]
        elif request["name"] in self.names:
            found = self.names[request["name"]]
        else:
            raise NameError(f"name {request['name']!r} is not defined")
        if "arguments" not in request:
            return found
        self.given = decode_tree(request["arguments"], lambda number, _: self.kept[number])
        positional, named = self.given
        return found(*positional, **named)

    def edited(self) -> dict[str, Any]:
        """The arguments of the last call, as they are after it; nothing if they cannot be sent."""
        try:
            return {} if self.given is None else {"arguments": self.encoder.tree(self.given, 0)}
        except BaseException:
            return {}

    def answer(self, content: dict[str, Any]) -> None:
        try:
            send(self.descriptor, json.dumps(content).encode())
        except WireError as error:
            send(self.descriptor, json.dumps(failure(error)).encode())
        except OSError:
            os._exit(0)


def failure(error: BaseException) -> dict[str, str]:
    """Class and text of an exception, whatever it does when it is printed."""
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    return {"raised": type(error).__name__[:100], "text": text.encode("ascii", "backslashreplace").decode()}


def main(descriptor: int, source: str) -> None:
    candidate = Candidate(descriptor)
    candidate.load(source)
    candidate.serve()
