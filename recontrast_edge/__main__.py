"""``python -m recontrast_edge`` is ``recontrast-edge``."""

from recontrast_edge.cli import main

main()
