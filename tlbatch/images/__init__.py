"""A store -> pixels: listing, reading loose images and shards, decoding, labels. Pillow lives here only."""
