"""One service that plays steps, loops and scripts on the virtual GPU."""
