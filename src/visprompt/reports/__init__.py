"""What runs came to: tables, tests, figures and a page, made of the folders of finished runs.

`report.report` is called; the files in the order in which data passes through them:

- load: folders -> one DataFrame, a row for each run, a column for each setting (settings: names and words).
- choices: runs of `split=tune` -> grids, and the points that validation chose.
- rows: final runs -> rows of tables, with a cell for each task, and the protocols under which rows compare.
- summary, statistical_tests, published: rows -> means, costs, p-values, and the papers' figures.
- tables, charts, sweeps: these -> tables, and charts as numbers.
- page: tables and charts -> the contents of a report and the HTML page (writers, figures: other formats).
- inspection, attention, closeups: what needs the model; only where `inspect` asks for it.
"""
