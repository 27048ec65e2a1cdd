"""Values as JSON with tags, between a program that is not trusted and the process that tests it. Nothing is executed.

    None, bool, str, finite float, int      as in JSON; an int beyond 53 bits is {"i": hexadecimal}
    list                                    a JSON list
    everything else                         {tag: content}, see `_encoders`
    any other object                        {"h": number, "c": class name}, a handle: equal to nothing but itself

Size, depth and number of parts are bounded on both sides. A subclass of an ordinary type is sent as that type. Ordered
and default dictionaries, counters and the views of a dictionary arrive as what they are, so that they compare as such.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_BYTES = 8 << 20
MAX_DEPTH = 60
MAX_PARTS = 400_000
MAX_INT_BITS = 1 << 17
MAX_DIGITS = 5000
"""Of a decimal, written out."""
MAX_EQUAL_HASHES = 64
"""Members of a set, or keys of a dictionary, with one hash."""
_EXACT = 1 << 53


TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (int, str, float, bool, list, tuple, dict, set, frozenset, bytes, complex, range, object)
}
"""Types that may be arguments."""
FACTORIES = {name: kind for name, kind in TYPES.items() if kind not in (range, object)}
"""What a default dictionary may make; with any other factory it arrives as one that makes nothing."""
_VIEWS: tuple[Any, Any, Any] = (type({}.keys()), type({}.values()), type({}.items()))
_DATE, _TIME = ("year", "month", "day"), ("hour", "minute", "second", "microsecond")


class WireError(Exception):
    """A value that cannot be sent, or bytes that are no value."""


class Handle:
    """What stands for an object that stays in the candidate's process."""

    def __init__(self, number: int, class_name: str):
        self.number, self.class_name = number, class_name


class Encoder:
    """Values to JSON text. `keep` stores an object that cannot be sent and returns its number."""

    def __init__(self, keep: Callable[[Any], int] | None = None):
        self.keep, self.parts = keep, 0

    def text(self, value: Any) -> str:
        self.parts = 0
        return json.dumps(self.tree(value, 0), allow_nan=False, ensure_ascii=True)

    def tree(self, value: Any, depth: int) -> Any:
        self.parts = self.parts + 1 if depth else 1  # of one value, not of all that were sent
        if depth > MAX_DEPTH or self.parts > MAX_PARTS:
            raise WireError("a value is nested too deeply or has too many parts")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if isinstance(value, bool | str):
            return _text(str.__str__(value)) if isinstance(value, str) else bool(value)
        if isinstance(value, int):
            return _integer(int.__int__(value))
        if isinstance(value, float):
            number = float.__float__(value)
            return number if math.isfinite(number) else {"f": repr(number)}
        if isinstance(value, Handle):
            return {"h": value.number, "c": value.class_name}
        return self._container(value, depth)

    def _container(self, value: Any, depth: int) -> Any:
        for kind, tag in ((list, ""), (tuple, "t"), (set, "s"), (frozenset, "z"), (deque, "q")):
            if isinstance(value, kind):
                own: Any = kind  # the type's own way through its items, whatever a subclass says
                items = [self.tree(item, depth + 1) for item in own.__iter__(value)]
                return {tag: items} if tag else items
        if isinstance(value, dict):
            return self._dictionary(value, depth)
        if isinstance(value, bytes | bytearray):
            return {"b" if isinstance(value, bytes) else "y": bytes(value).hex()}
        if isinstance(value, complex):
            return {"j": [self.tree(value.real, depth + 1), self.tree(value.imag, depth + 1)]}
        if isinstance(value, range):
            return {"r": [self.tree(part, depth + 1) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, Fraction):
            return {"n": [self.tree(value.numerator, depth + 1), self.tree(value.denominator, depth + 1)]}
        if isinstance(value, Decimal):
            return {"m": str(value)}
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return {"k": value.__name__}
        if isinstance(value, date | time | timedelta):
            return self._moment(value, depth)
        if isinstance(value, _VIEWS):
            return self._view(value, depth)
        return self._other(value, depth)

    def _pairs(self, items: Iterable[tuple[Any, Any]], depth: int) -> list[Any]:
        return [[self.tree(k, depth + 1), self.tree(v, depth + 1)] for k, v in items]

    def _dictionary(self, value: dict[Any, Any], depth: int) -> Any:
        if isinstance(value, OrderedDict):  # has an order of its own
            return {"O": self._pairs(OrderedDict.items(value), depth)}
        pairs = self._pairs(dict.items(value), depth)
        if isinstance(value, Counter):
            return {"C": pairs}
        if isinstance(value, defaultdict):
            name = next((n for n, kind in FACTORIES.items() if kind is value.default_factory), None)
            return {"D": [name, pairs]}
        return {"d": pairs}

    def _view(self, value: Any, depth: int) -> Any:
        """Of a dictionary: its keys, values or items."""
        keys, values, _ = _VIEWS
        if isinstance(value, keys | values):
            return {"K" if isinstance(value, keys) else "V": [self.tree(item, depth + 1) for item in value]}
        return {"I": self._pairs(value, depth)}

    def _moment(self, value: Any, depth: int) -> Any:
        """A date, a time, both or a duration. Those of a time zone that is no fixed offset stay where they are."""
        if isinstance(value, timedelta):
            return {"P": _own(timedelta, value, ("days", "seconds", "microseconds"))}
        if not isinstance(value, datetime | time):
            return {"A": _own(date, value, _DATE)}
        kind: Any = datetime if isinstance(value, datetime) else time
        zone, fold = _own(kind, value, ("tzinfo", "fold"))
        if zone is not None and type(zone) is not timezone:
            return self._kept(value)
        parts = _own(kind, value, _DATE + _TIME if kind is datetime else _TIME)
        offset = None if zone is None else self.tree(timezone.utcoffset(zone, None), depth + 1)
        return {"W" if kind is datetime else "T": [*parts, fold, offset]}

    def _other(self, value: Any, depth: int) -> Any:
        """Iterators are exhausted; numpy's arrays and numbers become lists and numbers; the rest stays where it is."""
        module = getattr(type(value), "__module__", "")
        if module == "numpy" and hasattr(value, "tolist"):
            return self.tree(value.tolist(), depth + 1)
        is_iterator = hasattr(value, "__next__") and hasattr(value, "__iter__")
        if is_iterator:
            items = []
            for item in value:
                items.append(self.tree(item, depth + 1))
            return {"e": items}
        return self._kept(value)

    def _kept(self, value: Any) -> Any:
        if self.keep is None:
            raise WireError(f"a {type(value).__name__} cannot be sent")
        return {"h": self.keep(value), "c": type(value).__name__[:100]}


def _own(kind: Any, value: Any, names: Iterable[str]) -> list[Any]:
    """Attributes as the type itself reads them, whatever a subclass says."""
    return [getattr(kind, name).__get__(value) for name in names]


def _text(value: str) -> Any:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return {"u": value.encode("utf-16-le", "surrogatepass").hex()}
    return value


def _integer(value: int) -> Any:
    if value.bit_length() > MAX_INT_BITS:
        raise WireError("an integer is too long")
    return value if -_EXACT <= value <= _EXACT else {"i": hex(value)}


def decode(text: str, handle: Callable[[int, str], Any]) -> Any:
    """The value of JSON text; `handle(number, class name)` makes what stands for an object over there.

    Raises: WireError for anything that `Encoder` does not write.
    """
    return decode_tree(parse(text), handle)


def parse(text: str | bytes) -> Any:
    """A message's JSON. Raises: WireError if it is none, or too long."""
    if len(text) > MAX_BYTES:
        raise WireError("a message is too long")
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise WireError("a message is not JSON") from error


def decode_tree(tree: Any, handle: Callable[[int, str], Any]) -> Any:
    """The value of what `parse` has read. Raises: WireError."""
    return _Decoder(handle).value(tree, 0)


def _refuse(name: str) -> None:
    raise ValueError(name)


_OF_NUMBERS: dict[str, tuple[Callable[..., Any], type, int]] = {
    "j": (complex, float, 2), "r": (range, int, 3), "n": (Fraction, int, 2),
}  # fmt: skip
"""What is made of numbers: of what type, and how many."""


def _decimal(text: str) -> Decimal:
    """Raises: WireError for one that would be an integer too long."""
    value = Decimal(text) if len(text) <= MAX_DIGITS else None
    if value is None or (value.is_finite() and abs(value.adjusted()) > MAX_DIGITS):
        raise WireError("a decimal is too long")
    return value


def _refuse_collisions(items: Iterable[Any]) -> None:
    """Raises: WireError if many have the same hash: a table of them takes the square of their number."""
    if max(Counter(map(hash, items)).values(), default=0) > MAX_EQUAL_HASHES:
        raise WireError("too many values of one hash")


class _Decoder:
    def __init__(self, handle: Callable[[int, str], Any]):
        self.handle, self.parts = handle, 0

    def value(self, tree: Any, depth: int) -> Any:
        self.parts += 1
        if depth > 2 * MAX_DEPTH or self.parts > 2 * MAX_PARTS:
            raise WireError("a value is nested too deeply or has too many parts")
        if tree is None or isinstance(tree, bool | str | int | float):
            return tree
        if isinstance(tree, list):
            return [self.value(item, depth + 1) for item in tree]
        try:
            return self._tagged(tree, depth)
        except WireError:
            raise
        except Exception as error:  # whatever a wrong content does to the type that it names
            raise WireError(f"a value cannot be read ({type(error).__name__})") from error

    def _tagged(self, tree: dict[str, Any], depth: int) -> Any:
        if set(tree) == {"h", "c"}:
            return self.handle(int(tree["h"]), str(tree["c"]))
        ((tag, content),) = tree.items()
        if tag in ("t", "s", "z", "q", "e"):
            items = [self.value(item, depth + 1) for item in content]
            if tag in ("s", "z"):
                _refuse_collisions(items)
            kinds: dict[str, Callable[[list[Any]], Any]] = {"t": tuple, "s": set, "z": frozenset, "q": deque, "e": iter}
            return kinds[tag](items)
        if tag in ("d", "C", "O", "D", "I"):
            return self._dictionary(tag, content, depth)
        if tag in ("K", "V"):
            items = [self.value(item, depth + 1) for item in content]
            if tag == "V":
                return dict(enumerate(items)).values()
            _refuse_collisions(items)
            return dict.fromkeys(items).keys()
        if tag in ("A", "T", "W", "P"):
            return self._moment(tag, content, depth)
        if tag in _OF_NUMBERS:
            make, kind, count = _OF_NUMBERS[tag]
            parts = [self.value(item, depth + 1) for item in content]
            if len(parts) != count or any(type(part) is not kind for part in parts):
                raise WireError(f"a value tagged {tag!r} has other parts")  # a text would be read as 10 ** anything
            return make(*parts)
        if tag == "i":
            if len(content) > MAX_INT_BITS // 4 + 3:
                raise WireError("an integer is too long")
            return int(content, 16)
        return _simple(tag, content)

    def _dictionary(self, tag: str, content: Any, depth: int) -> Any:
        factory, pairs = content if tag == "D" else (None, content)
        keys = [self.value(k, depth + 1) for k, _ in pairs]
        _refuse_collisions(keys)
        found = {key: self.value(v, depth + 1) for key, (_, v) in zip(keys, pairs, strict=True)}
        if tag == "C":
            counter: Counter[Any] = Counter()
            dict.update(counter, found)  # nothing is counted
            return counter
        if tag == "D":
            return defaultdict(None if factory is None else FACTORIES[factory], found)
        if tag == "I":
            return found.items()
        return OrderedDict(found) if tag == "O" else found

    def _moment(self, tag: str, content: list[Any], depth: int) -> Any:
        kind, count = {"A": (date, 3), "P": (timedelta, 3), "T": (time, 5), "W": (datetime, 8)}[tag]
        numbers, rest = content[:count], content[count:]
        if [type(number) for number in numbers] != [int] * count or len(rest) != (tag in ("T", "W")):
            raise WireError(f"a value tagged {tag!r} has other parts")
        if not rest:
            return kind(*numbers)
        zone = None if rest[0] is None else timezone(self.value(rest[0], depth + 1))
        return kind(*numbers[:-1], zone, fold=numbers[-1])


def _simple(tag: str, content: str) -> Any:
    """What is written as one text."""
    simple: dict[str, Callable[[str], Any]] = {
        "k": TYPES.__getitem__,
        "f": float, "m": _decimal, "b": bytes.fromhex, "y": bytearray.fromhex,
        "u": lambda hexadecimal: bytes.fromhex(hexadecimal).decode("utf-16-le", "surrogatepass"),
    }  # fmt: skip
    return simple[tag](content)
