"""Training of ReContrast models with PyTorch; needs the ``train`` extra.

recontrast-edge train DATA --out RUN
"""
