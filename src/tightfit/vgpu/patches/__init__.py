"""Every assignment onto torch that the virtual GPU makes."""
