"""Records for people: text, pictures and pages."""
