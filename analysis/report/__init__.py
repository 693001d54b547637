"""`python -m analysis.report RUNS... --out report.html`: runs, what they learned and do inside, in one file.

    runs.py       a run folder, read: what was asked, metrics, results, tables of its probes
    parts.py      sections, figures, views, panels: what the page is made of
    traces.py     lines, maps and layouts of plotly
    sections/     a file each, Runs -> Section; `sections.SECTIONS` is their order
    page.py       sections -> HTML, with template.html, style.css and report.js, and plotly.js inlined

Nothing is measured here: a section draws the tables that synthetic.run and probes.run have left, and says
which command makes those that are not there.
"""
