"""The stages on Ray. Ray lives here only."""
