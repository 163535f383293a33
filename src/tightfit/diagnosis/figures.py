"""Constants that judgements rest on, each with its source."""

LAUNCH_S = 2.5e-6
"""From one kernel's end to the next one's begin: `tightfit.simulation.speed.LAUNCH_S`, which a test compares; that
module needs torch."""
HOST_FLOPS = 5e11
"""FLOP/s of float32 matrix products on a desktop's processor: eight cores with AVX2 at 4 GHz peak at 1.0e12, and
training reaches about half."""
