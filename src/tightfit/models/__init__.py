"""What is trained: the model, its loss, its optimizer, and its forms on disk."""
