"""The report: the results of a run or a sweep as one self-contained HTML page."""

from kronsae.report.analysis import ReportData, report_data
from kronsae.report.html import render, write
from kronsae.report.sweeps import SweepPage, sweep_page

__all__ = ["ReportData", "SweepPage", "render", "report_data", "sweep_page", "write"]
