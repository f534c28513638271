"""Where the files lie that are shipped beside the code."""

from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
