"""Plans: candidates that fit a device, their predicted memory and speed, and the choice."""
