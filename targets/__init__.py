"""Imported as `awq_compile.targets`; the folder lies at the top level of the project."""

if __name__ != "awq_compile.targets":
    raise ImportError("import awq_compile.targets, not targets")
