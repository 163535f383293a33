"""Questions about a script, each answered by plays: the largest value, the card, the variant, the change."""
