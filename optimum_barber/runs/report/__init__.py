"""Reports: one page for any finished run, as HTML, Markdown and pictures."""

from .block_charts import picture as picture
from .write import write_report as write_report
