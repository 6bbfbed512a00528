"""Runs a compiled library on this machine. Needs tvm, numpy and tokenizers; neither torch nor transformers."""
