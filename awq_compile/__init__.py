"""awq-compile: a Hugging Face language model, quantised by AWQ and compiled for a device.

Importing this package is cheap: torch, transformers and tvm are imported by the modules that use them.
"""

__version__ = "0.1.0"
