"""Stage 8: a run folder -> numbers, pictures, pages. Reads folders only; knows neither Ray nor a model."""
