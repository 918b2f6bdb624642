"""Show how far all runs of a command are: a line for each finished run, and a bar on a terminal."""

from collections.abc import Iterable
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from visprompt.runs.unit import Outcome
from visprompt.text import Terminal, visible

console = Terminal()
_PERIOD = 86_400.0  # seconds of which finished runs count for the time left; a run may take hours


class Shown:
    """The lines of finished runs and the bar of a command's runs; a context manager.

    Args:
        total: Number of runs, as far as it is known before the first.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done, self._failed = total, 0, 0
        counts = TextColumn("{task.completed:.0f}/{task.total:.0f} runs, {task.fields[counts]}", markup=False)
        self._bar = Progress(
            counts,
            BarColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=_PERIOD,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, counts="")

    def __enter__(self) -> "Shown":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def running(self, count: int) -> None:
        """Show how many runs are being made."""
        self._bar.update(self._task, completed=self._done, counts=f"{self._failed} failed, {count} running")

    def finished(self, names: Iterable[str], outcomes: Iterable[Outcome], seconds: float) -> None:
        """Print a line for each run of a finished unit.

        Example:
            `12/240 dtd/lora recipe.lr=0.5: val/acc 43.1 % in 12.3 s`
        """
        for name, outcome in zip(names, outcomes, strict=True):
            self._done += 1
            self._failed += outcome.result is None
            self._bar.update(self._task, completed=self._done)
            self.say(f"{self._done}/{self._total} {name}: {_in_words(outcome)} in {seconds:.1f} s")

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        console.print(visible(sentence), highlight=False, soft_wrap=True)


def _in_words(outcome: Outcome) -> str:
    result = outcome.result
    if result is None:
        return f"failed ({outcome.reason})"
    if result.status == "finished":
        return f"{result.score_name} {100 * result.score:.1f} %"
    return "not scored" if result.status == "unscored" else f"diverged ({outcome.reason})"
