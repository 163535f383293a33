"""From an error log to what failed, which tensor it was, why, and fixes that were checked."""
