"""The report: what was measured of a run, as one self-contained HTML page."""

from kronsae.report.analysis import ReportData, report_data
from kronsae.report.html import render, write

__all__ = ["ReportData", "render", "report_data", "write"]
