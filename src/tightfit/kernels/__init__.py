"""Hidden bytes and cost of each operator on a card."""
