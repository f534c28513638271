"""Where the shipped configs are: inside an installed package, or beside it in a checkout."""

from pathlib import Path

INSTALLED = Path(__file__).parent / "configs"
CONFIGS = INSTALLED if INSTALLED.is_dir() else Path(__file__).parent.parent / "configs"
