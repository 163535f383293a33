"""The virtual GPU: a card that only keeps accounts."""
