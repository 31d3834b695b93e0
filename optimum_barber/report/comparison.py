"""x"""
from pathlib import Path
from .page import Page
COMPARE_NAME = "compare.json"


def comparison_page(directory: Path) -> Page:
    raise NotImplementedError
