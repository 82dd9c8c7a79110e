"""What a person sees of a compilation."""

from fxfuse.report.report import RegionReport, Report, summarize

__all__ = ["RegionReport", "Report", "summarize"]
