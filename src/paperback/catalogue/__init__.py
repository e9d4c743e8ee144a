"""The catalogue of the 71 methods: what there is, where it lives, who published it.

It is data (`methods.toml`) and a reader. Reading it imports no method and no torch; a method is imported when
its `load` is called.
"""

from paperback.catalogue.reader import TASKS, Method, check_task, find, methods, search

__all__ = ["TASKS", "Method", "check_task", "find", "methods", "search"]
