"""Reports: tables, statistical tests, figures and a page, built from the folders of finished runs.

The entry point is `report.report`. The files, in the order in which data passes through them:

- load: folders -> one DataFrame, a row for each run, a column for each setting (settings: names, words).
- choices: runs of `split=tune` -> grids, and the points that validation chose.
- rows: final runs -> rows of tables, with a cell for each task, and the protocols within which rows are
  comparable.
- summary, statistical_tests, published: rows -> means, costs, p-values, and the papers' accuracies.
- tables, charts, sweeps: these -> tables, and the numbers of charts.
- page: tables and charts -> the contents of a report and the HTML page (writers, figures: other formats).
- inspection, attention, closeups: what needs the model; only if `inspect=` asks for it.
"""
