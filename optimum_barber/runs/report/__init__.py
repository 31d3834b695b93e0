"""Reports: one page out of any finished run, as HTML, Markdown and pictures."""

from .pictures import picture as picture
from .write import write_report as write_report
