"""Names of the sources that every home has; imports nothing, so that help is quick."""

PYTHON_DOCS = "python_docs"
BUILT_IN = ("listings", "baskets", "histories", PYTHON_DOCS)
