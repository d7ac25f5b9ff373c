"""What ends `python -m local` with one line."""


class LocalError(Exception):
    """Nothing was started, or all that was has been ended. One line that names what is wrong and the fix."""

    def __init__(self, line: str, *, code: int = 2) -> None:
        super().__init__(line)
        self.code = code  # of the exit: 2 for a refusal before anything was started
