"""What was found, for people: text, pictures and pages made from plain data."""
