"""The records of VTAB-1k: 19 tasks in three groups, in the order of the papers' tables."""

from visprompt.data.catalog import vtab_natural, vtab_specialized, vtab_structured

RECORDS = (*vtab_natural.RECORDS, *vtab_specialized.RECORDS, *vtab_structured.RECORDS)
