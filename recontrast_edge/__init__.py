"""recontrast-edge: ReContrast anomaly detection on a production line.

Runs on the line computer. Importing this package imports nothing heavy:

    python -c "import recontrast_edge; print(recontrast_edge.__version__)"
"""

__version__ = "0.1.0"
