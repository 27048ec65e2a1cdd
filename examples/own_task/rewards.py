"""Rewards with TRL's signature: one number for each completion. Columns of the data arrive under their names."""


def sums_to(prompts, completions, total, **_):
    """How close the digits of the completion come to the number that the row asks for."""
    sums = [sum(int(sign) for sign in text if sign.isdigit()) for text in completions]
    return [max(0.0, 1.0 - abs(found - wanted) / wanted) for found, wanted in zip(sums, total, strict=True)]
