"""What a page shows of each kind of report: a module for each kind, named as it is.

Such a module has ``TITLE`` and these functions of a report:

- ``lead(report)``: sentences on what was measured;
- ``tables(report)``: its tables;
- ``seen(report)``: what is seen in its picture (that of `kvquant.evaluation.figures`), empty where there is none;
- ``notes(report)``: sentences below;
- ``summary(report)``: the columns that it has in the table on top of the page;
- ``options(file)``: the options of the command that printed a file, name -> value.
"""
