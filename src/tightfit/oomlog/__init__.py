"""An out-of-memory log, read to facts."""
