"""Plans: what may change so that a run fits its device, what each change takes, and which is the fastest."""
