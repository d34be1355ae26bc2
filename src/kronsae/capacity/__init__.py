"""Prediction of a training on given devices, before anything is downloaded or run; docs/planning.md has the formulas.

- `devices`: memory, peak rates and links of known devices;
- `models`: shapes of known language models, of a local ``config.json``, or given by hand;
- `work`: operations and bytes of a language model's pass and of an SAE's step; bytes sent between devices;
- `layout`: which parallelism a training needs, and its memory per device;
- `estimate`: all of it, with time, disk space and cost.

The requirements of one device are those that a run announces itself: `kronsae.runs.planning.Plan`.
"""
