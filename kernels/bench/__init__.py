"""Test-gated timings of the kernels beside their floors and the alternatives; see README.md."""
