"""Imported as `awq_compile.passes`; the folder lies at the top level of the project."""

if __name__ != "awq_compile.passes":
    raise ImportError("import awq_compile.passes, not passes")
