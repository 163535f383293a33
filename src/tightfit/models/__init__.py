"""The model, its loss, its optimizer, and its formats on disk."""
