"""A URL or path -> its bytes: whole objects, listings and conditional writes. fsspec and obstore live here only."""
