"""A table -> numbers, sentences, pages, and lines on a terminal."""
