"""Run one rank of a run on several devices: `python -m visprompt.runs.rank FILE`.

FILE holds the job as YAML. `run_all` has composed and checked the job and starts this process for each rank.
"""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import sys
from pathlib import Path

from visprompt.runs import ranks
from visprompt.runs.cli import one_sentence_errors


def main(file: Path) -> None:
    """Run the job in a file.

    Raises:
        SystemExit: The run failed; the parent process has been told why.
    """
    ranks.end_with_parent()
    with one_sentence_errors():
        try:
            # imported late: torch takes seconds, in which the parent may end
            from visprompt.runs import memory, run
            from visprompt.runs.job import Job

            signals.started()
            job = Job.from_yaml(file.read_text(encoding="utf-8"))
            with memory.explained_for(job):
                run.run_job(run.prepare(job))
        except BaseException as error:  # signals too: the parent is told about everything that ends a rank
            ranks.give_reason(error)
            raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
