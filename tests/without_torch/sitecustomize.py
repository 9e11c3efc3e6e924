"""With this folder on PYTHONPATH, Python has neither torch nor TensorFlow, as seen by `import` and by `find_spec`, with
which transformers looks for its backends."""

from importlib.machinery import PathFinder

_find_spec = PathFinder.find_spec


def _find_others(name, path=None, target=None):
    absent = name.split(".")[0] in {"torch", "torchvision", "tensorflow"}
    return None if absent else _find_spec(name, path, target)


PathFinder.find_spec = _find_others
