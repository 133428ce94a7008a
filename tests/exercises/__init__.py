"""Answers to the exercises, one module per lesson: wrong ones with what they must be told, and
right ones that are written otherwise than the solution."""

from collections.abc import Callable
from typing import Any


class Answers:
    """The answers of one lesson, by exercise."""

    def __init__(self) -> None:
        self.wrongs: list[tuple[str, Callable, str]] = []
        self.rights: list[tuple[str, Callable]] = []
        self.hunts: dict[str, Callable] = {}

    def wrong(self, exercise: str, words: str) -> Callable[[Callable], Callable]:
        """Add the wrong answer below; `words` must be part of the message that refuses it."""
        return lambda function: self.wrongs.append((exercise, function, words)) or function

    def right(self, exercise: str) -> Callable[[Callable], Callable]:
        """Add the right answer below, in another style than the solution's."""
        return lambda function: self.rights.append((exercise, function)) or function

    def hunt(self, exercise: str) -> Callable[[Callable], Callable]:
        """Add the function below, which makes an answer that still has the given bugs of a hunt."""
        return lambda function: self.hunts.setdefault(exercise, function)


class Recipe:
    """An answer that a function makes once it is handed over, and whose name it bears."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.__name__ = make, make.__name__
