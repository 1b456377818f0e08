"""A store -> pixels: listing, reading loose images and shards, decoding, labels. Only this package decodes with Pillow."""
