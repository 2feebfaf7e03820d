"""What ends a run with one sentence."""


class Refusal(ValueError):
    """An input that cannot be used, or work that cannot go on. Its message says what is wrong and what to do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence, without the stack."""
        return [f"{type(self).__name__}: {self}"]
