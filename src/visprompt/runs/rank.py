"""One rank of a run on several devices.

`python -m visprompt.runs.rank FILE`, where FILE holds the job as YAML.

`run_all` checked the job and started this process; here nothing is composed again.
"""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import sys
from pathlib import Path

from visprompt.runs import engine
from visprompt.runs.cli import one_sentence_errors


def main(file: Path) -> None:
    """Run the job of a file.

    Raises:
        SystemExit: The run failed; the parent process is told why.
    """
    engine.end_with_parent()
    with one_sentence_errors():
        try:
            from visprompt.runs import (
                memory,
                run,
            )  # imported late: torch takes seconds, and the parent may be gone
            from visprompt.runs.job import Job

            signals.started()
            job = Job.from_yaml(file.read_text(encoding="utf-8"))
            with memory.explained_for(job):
                run.run_job(run.prepare(job))
        except BaseException as error:  # whatever ends a rank is told to the process that started it
            engine.give_reason(error)
            raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
