"""From a trained run to files that engines open; needs the ``export`` extra.

    recontrast-edge export RUN --out model.onnx

Only ``torch_to_onnx`` imports PyTorch: everything that turns an ONNX file into an engine runs on a Jetson without it.
"""
