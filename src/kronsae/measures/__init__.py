"""Measurements of a whole run beyond the table: each module carries one out and is a verb of ``kronsae eval``.

The quantities themselves are defined in `kronsae.eval`; a module here picks the run's SAEs, model and text, calls them,
keeps the result in ``RUN/measures/<name>.json`` and shows it. `kronsae.report.sections` puts kept results on the page.
"""
