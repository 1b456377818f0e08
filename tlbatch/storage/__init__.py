"""A URL or path -> its bytes: whole objects, listings and conditional writes. Only this package imports fsspec and obstore."""
