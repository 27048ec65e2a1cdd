"""The process that holds the tests. It reaches the program through proxies and never has an object or a line of it.

Names are resolved on this side: the tests' own, Python's, and those of trusted helper code. Only the names that the
task declares come from the program.
"""

from __future__ import annotations

import builtins
import json
import os
from collections import deque
from collections.abc import Sequence
from typing import Any

from channel import receive, send
from wire import Encoder, Handle, WireError, decode_tree, parse


class Gone(BaseException):
    """The candidate has left; nothing in a test may catch this."""


class Link:
    """Calls into the candidate's process, one at a time."""

    def __init__(self, descriptor: int, *, copies_back: bool = False):
        self.descriptor, self.copies_back = descriptor, copies_back

    def ask(self, request: dict[str, Any]) -> Any:
        """The value of the answer to a request. Raises: the exception that the answer names, WireError, Gone."""
        return self.exchange(json.dumps(request).encode())

    def exchange(self, request: bytes) -> Any:
        """The same for a request that is a message already."""
        self.write(request)
        return self.read()

    def write(self, *requests: bytes) -> None:
        """Messages to the program. Raises: Gone."""
        try:
            send(self.descriptor, *requests)
        except OSError as error:
            raise Gone from error

    def read(self) -> Any:
        return self.value(self.answer())

    def answer(self) -> dict[str, Any]:
        """The next message. Raises: WireError, Gone."""
        try:
            content = receive(self.descriptor)
        except (EOFError, OSError) as error:
            raise Gone from error
        answer = parse(content)  # what the program raised is raised below, an OSError of its own included
        if not isinstance(answer, dict):
            raise WireError("an answer is no object")
        return answer

    def value(self, answer: dict[str, Any]) -> Any:
        """Raises: the exception that the answer names, WireError."""
        if "raised" in answer:
            raise exception(str(answer["raised"]), str(answer.get("text", "")))
        return decode_tree(answer.get("value"), self.handle)

    def call(self, request: dict[str, Any], positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not self.copies_back:
            return self.exchange(self.request(request, positional, named))
        self.write(self.request({**request, "back": True}, positional, named))
        answer = self.answer()
        if "arguments" in answer:
            edited([list(positional), named], decode_tree(answer["arguments"], self.handle))
        return self.value(answer)

    @staticmethod
    def request(request: dict[str, Any], positional: Sequence[Any], named: dict[str, Any]) -> bytes:
        """The message of a call. Raises: WireError if an argument cannot be sent."""
        return json.dumps({**request, "arguments": Encoder().tree([list(positional), named], 0)}).encode()

    def handle(self, number: int, class_name: str) -> Proxy:
        return Proxy(self, number, class_name)


class Function:
    """A name of the program that the tests may call."""

    def __init__(self, link: Link, name: str):
        self._link, self._name = link, name
        self.__name__ = name

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._link.call({"name": self._name}, positional, named)


class Proxy(Handle):
    """An object in the candidate's process: equal to nothing but itself; its attributes and methods are asked there."""

    def __init__(self, link: Link, number: int, class_name: str):
        super().__init__(number, class_name)
        self._link = link

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return hash((Proxy, self.number))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask({"of": self.number, "name": name})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("number", "class_name", "_link"):
            object.__setattr__(self, name, value)
        else:
            self._link.call({"of": self.number, "name": "__setattr__"}, (name, value), {})

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._link.call({"of": self.number, "name": ""}, positional, named)


def edited(old: Any, new: Any) -> Any:
    """What stands for `new` on this side: `old` itself, given the content of `new`, where both are the same kind of
    container; else `new`. Places and keys that stay keep their objects."""
    if isinstance(old, Proxy) and isinstance(new, Proxy) and old.number == new.number:
        return old
    if type(old) is not type(new):
        return new
    if isinstance(old, list | deque):
        items = [edited(a, b) for a, b in zip(old, new, strict=False)] + list(new)[len(old) :]
        old.clear()
        old.extend(items)
    elif isinstance(old, dict):
        pairs = [(key, edited(old[key], value) if key in old else value) for key, value in new.items()]
        old.clear()
        for key, value in pairs:
            old[key] = value
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    elif not isinstance(old, tuple):
        return new
    elif len(old) == len(new):  # a tuple stays, what it holds may change
        for a, b in zip(old, new, strict=True):
            edited(a, b)
    return old


def exception(name: str, text: str) -> Exception:
    """One of Python's own exceptions; any other name is a RuntimeError."""
    kind = getattr(builtins, name, None)
    # one that ends a loop would end the test's own loop, and so pass it
    ends_loops = name in ("StopIteration", "StopAsyncIteration")
    is_own = isinstance(kind, type) and issubclass(kind, Exception) and not ends_loops
    try:
        return kind(text) if is_own else RuntimeError(f"{name}: {text}")  # type: ignore[misc]
    except Exception:  # UnicodeDecodeError and the like want more than a text
        return RuntimeError(f"{name}: {text}")


def run(link: Link, task: dict[str, Any]) -> dict[str, Any]:
    """{"loaded", "passed": one bool for each test, "reason"}: how the tests of a task went."""
    found: dict[str, Any] = {"loaded": False, "passed": [], "reason": ""}
    try:
        link.read()
    except Gone:
        return found | {"reason": "gone"}
    except Exception as error:
        return found | {"reason": describe(error)}
    found["loaded"] = True
    names: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    try:
        exec(compile(task.get("helpers", ""), "<helpers>", "exec", dont_inherit=True), names)
    except Exception as error:
        return found | {"broken": describe(error)}
    names |= {name: Function(link, name) for name in task["names"]}
    try:
        exec(compile(task.get("setup", ""), "<setup>", "exec", dont_inherit=True), names)
        for test in task["tests"]:
            try:
                exec(compile(test, "<test>", "exec", dont_inherit=True), names)
                found["passed"].append(True)
            except Exception as error:
                found["passed"].append(False)
                found["reason"] = found["reason"] or describe(error)
    except Gone:
        found["reason"] = "gone"
    except Exception as error:
        found["reason"] = describe(error)
    return found


def describe(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"[:300]
        return text.encode("utf-8", "backslashreplace").decode()  # it goes into logs
    except Exception:
        return type(error).__name__


def main(descriptor: int, tests: int, result: int) -> None:
    with os.fdopen(tests, "rb") as file:
        file.seek(0)
        task = json.loads(file.read())
    link = Link(descriptor, copies_back=bool(task.get("copies_back")))
    send(result, json.dumps(run(link, task)).encode("utf-8", "backslashreplace"))
    os._exit(0)
