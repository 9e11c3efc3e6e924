"""Reward functions of the tests, which a configuration names."""


def even(completions, completion_ids, **columns):
    """The share of even token ids: something that varies between completions of a random model."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def same(completions, **columns):
    return [0.5] * len(completions)


def broken(completions, id, **columns):
    """Not a number for one prompt in three."""
    return [float("nan") if name == max(id) else 1.0 for name in id]
