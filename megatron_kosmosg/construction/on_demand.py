"""A model that is loaded when the first batch needs it and let go when its step is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Model = TypeVar("Model")


class OnDemand(Generic[Model]):
    """Holds a model from the first use to the end of its step; `open_model` loads it."""

    def __init__(self, open_model: Callable[[], Model]) -> None:
        self._open = open_model
        self._model: Model | None = None

    def get(self) -> Model:
        """The model, which is loaded now if it is not yet."""
        if self._model is None:
            self._model = self._open()
        return self._model

    def release(self) -> None:
        """Lets go of the model, which frees its memory."""
        self._model = None
