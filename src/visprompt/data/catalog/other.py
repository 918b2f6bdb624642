"""The records of datasets outside the papers' benchmarks; docs/add-a-dataset.md says how to add one."""

from visprompt.data.catalog.task import TaskSpec

RECORDS: tuple[TaskSpec, ...] = ()
