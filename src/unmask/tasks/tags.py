"""The format rewards of d1 (arXiv:2504.12216): how well a completion keeps to <reasoning> and <answer>.

Each comes in two ways. `published` repeats the code behind published numbers: its patterns do not cross line ends, and
a text without a closed answer is punished for its whole length. Otherwise reasoning may have lines, and only what
follows the answer is punished. All take time linear in the text, where the published patterns are quadratic.
"""

from __future__ import annotations

_OPEN, _CLOSE, _ANSWER, _END = "<reasoning>", "</reasoning>", "<answer>", "</answer>"

SOFT = STRICT = 0.5
TAG = 0.125
PER_CHARACTER = 0.001


def soft_format(text: str, *, published: bool = False) -> bool:
    """Begins with reasoning in tags, then, white space apart, an answer in tags; anything may follow."""
    if not text.startswith(_OPEN):
        return False
    # published: "." does not match a line end, but the white space between the two parts may hold some
    reach = text.find("\n") if published and "\n" in text else len(text)
    place, end, line = text.find(_CLOSE, len(_OPEN)), 0, 0
    while place >= 0 and place + len(_CLOSE) <= reach:
        answer = place + len(_CLOSE)
        while answer < len(text) and text[answer].isspace():
            answer += 1
        if text.startswith(_ANSWER, answer):
            end = end if end >= answer + len(_ANSWER) else text.find(_END, answer + len(_ANSWER))
            if end < 0:
                return False
            line = line if line >= answer else _find(text, "\n", answer)
            if not published or end < line:
                return True
        place = text.find(_CLOSE, place + len(_CLOSE))
    return False


def _find(text: str, part: str, begin: int) -> int:
    """Place of the part from `begin` on; the length of the text where there is none."""
    place = text.find(part, begin)
    return place if place >= 0 else len(text)


def strict_format(text: str, *, published: bool = False) -> bool:
    """Exactly: each of the four tags on a line of its own, reasoning first, and nothing else but the final line end.

    With `published` reasoning and answer have one line each.
    """
    body = text.removesuffix("\n") if text.endswith("\n\n") else text  # a pattern's $ also stands before the last one
    head, tail = f"{_OPEN}\n", f"\n{_END}\n"
    if not (body.startswith(head) and body.endswith(tail) and len(body) > len(head) + len(tail)):
        return False
    inside = body[len(head) : -len(tail)]
    reasoning, middle, answer = inside.partition(f"\n{_CLOSE}\n{_ANSWER}\n")
    return bool(middle) and not (published and ("\n" in reasoning or "\n" in answer))


def tag_count(text: str, *, published: bool = False) -> float:
    """0.125 for each of four tags that is there once on a line of its own, less 0.001 per character behind the answer.

    The published code takes that off twice, and measures it from the beginning where the closing tag is not followed by
    a line end; so it may be far below zero.
    """
    count = TAG * (text.count(f"{_OPEN}\n") == 1) + TAG * (text.count(f"\n{_CLOSE}\n") == 1)
    has_answer, has_end = text.count(f"\n{_ANSWER}\n") == 1, text.count(f"\n{_END}") == 1
    count += TAG * has_answer + TAG * has_end
    if published:
        count -= PER_CHARACTER * len(text.split(f"\n{_END}\n")[-1]) * has_answer
        return count - PER_CHARACTER * (len(text.split(f"\n{_END}")[-1]) - 1) * has_end
    behind = text.rpartition(_END)[2].removeprefix("\n") if _END in text else ""
    return count - PER_CHARACTER * len(behind)
