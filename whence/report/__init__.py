"""What people read: a report of finished scores, as one page, as Markdown and as plain text."""

from whence.report.build import build_report
from whence.report.gather import gather
from whence.report.html import write_html
from whence.report.markdown import write_markdown
from whence.report.model import Report
from whence.report.write import write_curves, write_report, write_texts

__all__ = ["Report", "build_report", "gather", "write_curves", "write_html", "write_markdown", "write_report", "write_texts"]
