"""One verb a file: a checked configuration -> its work -> its result. No flags and no printing."""
