"""The verbs of ``kronsae eval``: each module runs one measurement on a finished run.

The metrics are defined in `kronsae.eval`. A module here loads the run's SAEs, model and text, computes the metrics,
stores the result in ``RUN/measures/<name>.json`` and prints it. `kronsae.report.sections` renders stored results on the
report page.
"""
