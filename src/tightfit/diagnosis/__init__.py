"""From an error log to the failure, its tensor, its causes, and remedies that were checked."""
