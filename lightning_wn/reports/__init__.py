"""What becomes of a run: figures, histories read back from loggers, and the HTML page."""
